"""The CUDA cases of the test suite, trainers in half precision, and two attacks.

The trainers have a defence and a monitor. The attacks, AutoAttack and the Wasserstein attack, see a small model, and their examples
are held against the threat model.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.gpu.book import Row
from benchmarks.gpu.classifier import Classifier, OnCard, network, trainer
from benchmarks.gpu.context import Context
from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD, AutoAttack, WassersteinAttack, worst_case
from lightning_wdefense.attacks.wasserstein.feasibility import wasserstein_feasibility

ROOT = Path(__file__).resolve().parents[3]
TESTS = ["tests/transport", "tests/modules", "tests/attacks", "tests/metrics"]
CHOSEN = "(gpu or cuda) and not Synchronizing"
SPOILING = "gpu and Synchronizing"
"""A test in which a recording fails, after which its process may not be worth much."""
OPTIONS = "--import-mode=importlib"
"""In place of pyproject.toml's: no plugin that may be missing on a bare machine, and slow tests too."""
SECONDS = 80.0
"""That the tests may take."""


def tests(chosen: str, context: Context) -> Row:
    """Those of such names; at toy size they are only collected."""
    files = sorted(
        str(file.relative_to(ROOT))
        for folder in TESTS
        for file in (ROOT / folder).rglob("test_*.py")
        if "cuda" in file.read_text()
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-o",
        f"addopts={OPTIONS}",
        "-p",
        "no:cacheprovider",
        "-k",
        chosen,
        *files,
    ]
    if context.rehearse:
        command.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            code = process.wait(max(10, min(SECONDS, context.left - 25)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        output.seek(0)
        text = output.read()
    print(text[-6000:], flush=True)
    count = {word: len(re.findall(rf"\b{word}\b.*::|::.*\b{word}\b", text)) for word in ("PASSED", "FAILED")}
    failed = re.findall(r"^FAILED (.*)$", text, re.MULTILINE) or re.findall(r"FAILED (\S+::\S+)", text)
    return {
        "right": code == 0,
        "outcome": "not finished" if code is None else text.strip().splitlines()[-1].strip("= "),
        "passed": count["PASSED"],
        "failed": [each[:160] for each in failed][:40],
    }


def precision(name: str, recipe: str, context: Context) -> Row:
    """A few steps of a Trainer with a defence and a monitor."""
    torch.manual_seed(0)
    x = torch.rand(64, 3, 32, 32, device=context.device)
    y = torch.randint(10, (64,), device=context.device)
    module = Validated(network(context.rehearse))
    threat = ThreatModel(eps=8 / 255)
    monitor = RobustnessMonitor(threat, {"pgd": PGD(threat, steps=3)})
    callbacks: list[L.Callback] = [WassersteinDefense(Recipe.named(recipe, threat, warmup_epochs=0)), monitor]
    fit = trainer(context.device, name, callbacks, max_epochs=1, limit_train_batches=3)
    batches = OnCard(x, y, 16, 0)
    fit.fit(module, batches, batches)
    finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    robust = fit.callback_metrics.get("val/robust_acc")
    return {"right": finite and robust is not None, "val/robust_acc": float("nan") if robust is None else float(robust)}


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


def attack(name: str, context: Context) -> Row:
    """On a CNN that was trained for some seconds on scikit-learn's digits."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32, device=context.device).unsqueeze(1) / 16
    y = torch.tensor(digits.target, device=context.device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)).to(
        context.device
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(5 if context.rehearse else 200):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1297]), y[:1297]).backward()
        optimizer.step()
    count = 8 if context.rehearse else 500
    x, y = x[1297 : 1297 + count], y[1297 : 1297 + count]
    threat = ThreatModel(norm="wasserstein", eps=0.5) if name == "wasserstein" else ThreatModel(eps=0.1)
    short = context.rehearse
    made = (
        WassersteinAttack(threat, **({"steps": 2} if short else {}))
        if name == "wasserstein"
        else AutoAttack(threat, **({"steps": 2, "queries": 10} if short else {"steps": 50, "queries": 500}))
    )
    start = time.perf_counter()
    found = worst_case(model, {name: made}, x, y)
    context.synchronize()
    seconds = time.perf_counter() - start
    if name == "wasserstein":
        few = slice(0, 2 if short else 20)
        legal = bool(wasserstein_feasibility(x[few], found.inputs[few], threat).feasible(threat.eps, 1e-4).all())
    else:
        legal = bool(
            ((found.inputs - x).abs().amax() <= threat.eps + 1e-6)
            & (found.inputs >= 0).all()
            & (found.inputs <= 1).all()
        )
    clean = float((found.clean == y).float().mean())
    return {"right": legal, "clean": clean, "robust": float(found.robust.float().mean()), "s": seconds}


def run(context: Context) -> None:
    context.measure("tests with a GPU in their name", lambda: tests(CHOSEN, context))
    for name in ("16-mixed", "bf16-mixed", "bf16-true", "32-true"):
        if not (context.rehearse and name == "16-mixed"):
            context.measure(
                f"Trainer, {name}, class-transport",
                lambda name=name: precision(name, "class-transport", context),
                seconds=3,
            )
    context.measure(
        "Trainer, 16-mixed, critic" if not context.rehearse else "Trainer, bf16-mixed, critic",
        lambda: precision("bf16-mixed" if context.rehearse else "16-mixed", "critic", context),
        seconds=3,
    )
    context.measure("a test whose recording fails", lambda: tests(SPOILING, context), seconds=15)
    for name in ("wasserstein", "autoattack"):
        context.measure(name, lambda name=name: attack(name, context), seconds=5)
