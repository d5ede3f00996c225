"""Reports of everything that can be measured, and of as little as there can be."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from support.lightning_modules import digits_loaders, trained_classifier
from support.random_state import one_thread, seeded_tests
from torch import nn

from lightning_wdefense import EvaluationResult, ThreatModel, evaluate
from lightning_wdefense.attacks import FMN
from lightning_wdefense.audit import AuditReport, Finding, Report

__all__ = ["one_thread", "seeded_tests"]

THREAT = ThreatModel(eps=0.1)
EVIL = "<script>alert('1')</script> & \"friends\" | *now* [x](y)"
FINDINGS = (
    Finding("logits", "pass", "0.0% of 40 samples", "The outputs are logits."),
    Finding("zero-gradients", "fail", "38.0% of 40 samples", f"No gradient. {EVIL}", "Use float64.", 0.38),
    Finding("black-box", "warn", "pgd, 80 steps: 1 of 20 fall", "Odd.", "Repeat it.", float("nan"), 0.5),
)
AUDIT = AuditReport(FINDINGS, THREAT, ("fgsm", "pgd"), 40, 0.95, 0.5, 0.25, 61.0)


@functools.cache
def measured(full: bool) -> EvaluationResult:
    options = {"distances": FMN(THREAT, steps=10), "examples": 3} if full else {"features": None}
    return evaluate(trained_classifier().net, digits_loaders()[1], THREAT, ["fgsm", "pgd"], progress=False, **options)


class Threshold(nn.Module):
    """Each pixel is of class 1 where it is above one half."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1)


@functools.cache
def of_masks() -> EvaluationResult:
    inputs = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0.45).long()
    labels[0] = -100
    return evaluate(Threshold(), [(inputs, labels)], THREAT, ["fgsm"], epsilons=[0.05], examples=2, progress=False)


@functools.cache
def of_rows() -> EvaluationResult:
    threat = ThreatModel(norm="l2", eps=0.5, bounds=None)
    inputs = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    batch = inputs, (inputs[:, 0] < inputs[:, 1]).long()
    return evaluate(nn.Identity(), [batch], threat, ["pgd"], distances="fmn", examples=2, progress=False)


class Diverged(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10] * torch.nan


@functools.cache
def diverged() -> EvaluationResult:
    return evaluate(Diverged(), digits_loaders()[1], THREAT, ["pgd"], distances="fmn", examples=2, progress=False)


CASES = {
    "full": lambda: Report(
        "robust " + EVIL, measured(True), AUDIT, {"training (s)": 12.5}, {"seed": 0, EVIL: {"a": EVIL}}
    ),
    "least": lambda: Report("least", measured(False)),
    "masks": lambda: Report("masks", of_masks()),
    "rows": lambda: Report("rows", of_rows(), settings={"class_names": ["yes " + EVIL, "no"]}),
    "diverged": lambda: Report("diverged", diverged()),
}


@pytest.fixture(scope="module", params=CASES)
def report(request) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CASES[request.param]()
