"""`audit` at its face: what it takes, what it gives, what it refuses, and that it leaves everything as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from audit.zoo.parts import After, Before
from audit.zoo.training import THREAT, held_out, linear_model, trained
from support.modules import Nasty, Snapshot
from torch import nn

import lightning_wdefense
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import PGD
from lightning_wdefense.audit import AuditReport, Finding, audit
from lightning_wdefense.audit.checks import CHECKS

QUICK = {"pgd": PGD(THREAT, steps=5)}


def report(model=None, batch=None, threat=THREAT, attacks=QUICK, **options):
    images, labels = held_out(30)
    options = {"progress": False, "samples": 30} | options
    return audit(model or linear_model(), [batch or (images, labels)], threat, attacks, **options)


def test_every_check_says_something_once():
    found = report()
    assert [finding.check for finding in found.findings] == list(CHECKS)
    assert found.samples == 30
    assert found.attacks == ("pgd",)
    assert found.seconds > 0
    for check in CHECKS:
        assert found[check].check == check
        assert check in str(found)


def test_the_claim_is_what_evaluate_measures():
    images, labels = held_out(60)
    measured = lightning_wdefense.evaluate(linear_model(), [(images, labels)], THREAT, ["pgd"], features=None)
    found = report(batch=(images, labels), attacks=["pgd"], samples=60)
    assert found.clean_acc == pytest.approx(measured.clean_acc, abs=1e-6)
    assert found.robust_acc == pytest.approx(measured.robust_acc, abs=0.04)  # other noise


def test_a_linear_model_has_the_accuracy_of_the_closed_form():
    """In L-infinity without bounds the margin to a class falls by eps times the L1 norm of the difference of the weights."""
    torch.manual_seed(0)
    model, images = nn.Linear(6, 3), torch.randn(80, 6)
    with torch.no_grad():
        logits = model(images)
        labels = logits.argmax(1)
        gaps = logits.gather(1, labels[:, None]) - logits
        reach = (model.weight[labels][:, None] - model.weight[None]).abs().sum(2)
        distance = (gaps / reach.clamp_min(1e-9)).scatter(1, labels[:, None], torch.inf).amin(1)
    eps = float(distance.sort().values[39:41].mean())
    found = report(model, (images, labels), ThreatModel(eps=eps, bounds=None), None, samples=80)
    assert found.passed
    assert found.audited_acc == pytest.approx(float((distance > eps).float().mean()), abs=1e-6)


def test_the_claim_is_the_worst_case_of_its_attacks():
    """A strong attack first, a weak one after it: what the first one broke stays broken."""
    strong, weak = {"pgd": PGD(THREAT, steps=20)}, {"weak": PGD(THREAT, steps=1, step_size=1e-6, random_start=False)}
    assert (
        report(attacks=strong | weak).robust_acc == report(attacks=strong).robust_acc < report(attacks=weak).robust_acc
    )


def test_the_report_survives_json():
    found = report()
    again = AuditReport.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    assert again.verdict == found.verdict


def test_the_same_seed_gives_the_same_report():
    first, second = report(seed=3).to_dict(), report(seed=3).to_dict()
    del first["seconds"], second["seconds"]
    assert first == second


@pytest.mark.parametrize("fail_at", [None, 1, 30, 100])
@pytest.mark.filterwarnings("ignore:The model is not run on parts")
def test_everything_is_left_as_it_was(fail_at):
    model = Nasty(64, classes=10, fail_at=fail_at)
    before, hooks = Snapshot(model), hooks_of(model)
    with torch.no_grad():
        if fail_at is None:
            assert report(model)["randomness"].verdict == "warn"  # a little noise, in eval mode too
        else:
            with pytest.raises(RuntimeError, match="nasty failure"):
                report(model)
        assert not torch.is_grad_enabled()
    before.check()
    assert hooks_of(model) == hooks


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_it_runs_in_inference_mode():
    model = linear_model()
    with torch.inference_mode():
        images, labels = held_out(20)
        found = report(model, batch=(images.clone(), labels.clone()), samples=20)
        assert torch.is_inference_mode_enabled()
    assert found.samples == 20


@pytest.mark.parametrize("size", [1, 7, 30, 64])
def test_batches_of_any_size(size):
    images, labels = held_out(30)
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    found = audit(linear_model(), batches, THREAT, QUICK, samples=25, progress=False)
    assert found.samples == 25


@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel("l2", 0.5),
        ThreatModel("l1", 2.0),
        ThreatModel(eps=0.1, mean=0.3, std=0.4),
        ThreatModel("wasserstein", 0.2),
    ],
    ids=lambda threat: f"{threat.norm}-{threat.std}",
)
def test_other_threats(threat):
    images, labels = held_out(20)
    model = Before(threat.to_data, trained())
    found = report(model, (threat.to_model(images), labels), threat, None, samples=20)
    assert found.passed, found


def test_units_make_no_difference():
    images, labels = held_out(30)
    threat = ThreatModel(eps=0.15, mean=0.3, std=0.05)
    plain, normalised = (
        report(trained()),
        report(
            Before(threat.to_data, trained()), (threat.to_model(images), labels), threat, {"pgd": PGD(threat, steps=5)}
        ),
    )
    for check in ("zero-gradients", "finite-differences", "growing-eps", "unbounded", "planted"):
        assert normalised[check].value == pytest.approx(plain[check].value, abs=0.02), check


@pytest.mark.parametrize("kind", [torch.long, torch.float])
def test_a_single_logit(kind):
    images, labels = held_out(30)
    model = After(linear_model(), lambda z: z[:, 5:].logsumexp(1, keepdim=True) - z[:, :5].logsumexp(1, keepdim=True))
    found = report(model, (images, (labels > 4).to(kind)))
    assert found["logits"].verdict == "pass"
    assert found.clean_acc > 0.7


class Picked(nn.Module):
    """One of several networks, another one at each call."""

    def __init__(self, *networks: nn.Module):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x):
        return self.networks[int(torch.randint(len(self.networks), ()))](x)


@pytest.mark.parametrize("seed", range(3))  # the first two calls are alike for some
def test_a_model_that_runs_other_layers_at_each_call(seed):
    model = Picked(trained(), linear_model())
    torch.manual_seed(seed)
    found = report(model, held_out(16), samples=16)
    assert found["randomness"].verdict in ("warn", "fail")
    assert found["planted"].verdict != "skipped"


def test_a_tiny_radius_is_no_reason_to_fail():
    assert report(trained(), threat=ThreatModel(eps=1e-4), attacks=None).passed


def test_outputs_of_a_dictionary():
    images, labels = held_out(20)
    model = After(linear_model(), lambda z: {"features": z[:, :2], "scores": z})
    found = report(model, {"image": images, "label": labels}, outputs="scores", samples=20)
    assert found["logits"].verdict == "pass"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"threat": 0.1}, TypeError, r"ThreatModel\(eps=0.1\)"),
        ({"threat": ThreatModel(eps=0.0), "attacks": None}, ValueError, "positive eps"),
        ({"attacks": ["pdg"]}, ValueError, "Did you mean 'pgd'"),
        ({"attacks": []}, ValueError, "attacks= is empty"),
        ({"attacks": ["soft-ball-pgd"]}, ValueError, "leaves the threat model's ball"),
        ({"attacks": [PGD(ThreatModel(eps=0.3))]}, ValueError, "same threat model"),
        ({"model": len}, TypeError, "nn.Module"),
        ({"batch": (torch.rand(4, 1, 8, 8) + 3, torch.zeros(4, dtype=torch.long))}, ValueError, "mean and std are not set"),
        ({"batch": (torch.rand(4, 1, 8, 8), torch.full((4,), 12))}, ValueError, "12"),
        ({"batch": (torch.rand(4, 1, 8, 8), torch.zeros(4, 3, dtype=torch.long))}, ValueError, "labels have shape"),
        ({"model": nn.Conv2d(1, 4, 1), "batch": (torch.rand(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))}, ValueError, "one class for each sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input(change, error, says):
    with pytest.raises(error, match=says):
        report(**change)


def test_an_empty_loader():
    with pytest.raises(ValueError, match="no batch"):
        audit(linear_model(), [], THREAT, progress=False)


def test_findings_know_their_verdicts():
    with pytest.raises(ValueError, match="verdict must be one of"):
        Finding("logits", "good", "", "")
    with pytest.raises(KeyError, match="no check 'logit'"):
        report()["logit"]


def test_the_top_level_has_the_function():
    assert lightning_wdefense.audit is audit


def test_the_page_explains_every_check():
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    table = page.split("## The checks")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.M) == list(CHECKS)
