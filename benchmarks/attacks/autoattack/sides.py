"""The same four parts in sequence, each on what the ones before have left: ours, torchattacks', and the official code's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn

from lightning_wdefense.attacks import AutoAttack, ThreatModel, worst_case

Left = dict[str, Tensor]
"""Which samples are left after each part, ``(N,)``, by its name."""
Side = Callable[[nn.Module, Tensor, Tensor, ThreatModel, int, int], tuple[Left, dict[str, dict[str, float]]]]


class Clock:
    """Seconds of each part, of this process's cores and by the wall."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self._last = time.process_time(), time.perf_counter()

    def lap(self, part: str) -> None:
        """The part has ended; the next one begins."""
        now = time.process_time(), time.perf_counter()
        self.parts[part] = {
            key: round(b - a, 3) for key, a, b in zip(("cpu_s", "wall_s"), self._last, now, strict=True)
        }
        self._last = now


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, queries: int) -> Any:
    """The parts of :class:`AutoAttack`."""
    left: Left = {}
    clock = Clock()

    def note(part: str, remaining: Tensor) -> None:
        left[part] = remaining
        clock.lap(part)

    parts = {part.name: part for part in AutoAttack(threat, steps, queries).parts}
    worst_case(model, parts, x, y, on_attack=note)
    return left, clock.parts


def of_torchattacks(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, queries: int) -> Any:
    """Torchattacks' parts at the same settings, called as its users call them."""
    common = {"norm": {"linf": "Linf", "l2": "L2"}[threat.norm], "eps": threat.eps, "seed": 0}
    parts = {
        "apgd-ce": torchattacks.APGD(model, loss="ce", steps=steps, **common),
        "apgd-t": torchattacks.APGDT(model, n_classes=10, steps=steps, **common),
        "fab-t": torchattacks.FAB(model, n_classes=10, multi_targeted=True, steps=steps, **common),
        # torchattacks compresses its schedule of windows by default, the official code does not.
        "square": torchattacks.Square(model, n_queries=queries, resc_schedule=False, **common),
    }
    clock, left = Clock(), {}
    remaining = _right(model, x, y)
    for part, attack in parts.items():
        index = remaining.nonzero().squeeze(1)
        if len(index):
            found = attack(x[index], y[index])
            remaining = remaining.clone()
            remaining[index] = _right(model, found, y[index])
        left[part] = remaining
        clock.lap(part)
    return left, clock.parts


def of_official_code(folder: Path) -> Side:
    """The standard version of a checkout of github.com/fra31/auto-attack, whose code is not part of this project."""

    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, queries: int) -> Any:
        with _importable(folder):
            from autoattack import AutoAttack as Official
        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        attack = Official(model, norm=norm, eps=threat.eps, version="standard", seed=0, device="cpu", verbose=False)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = steps
        attack.square.n_queries = queries
        clock, left = Clock(), {}
        remaining = _right(model, x, y)
        for part in ("apgd-ce", "apgd-t", "fab-t", "square"):
            index = remaining.nonzero().squeeze(1)
            if len(index):
                attack.attacks_to_run = [part]
                found = attack.run_standard_evaluation(x[index], y[index], bs=len(index))
                remaining = remaining.clone()
                remaining[index] = _right(model, found, y[index])
            left[part] = remaining
            clock.lap(part)
        return left, clock.parts

    return run


@contextmanager
def _importable(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y
