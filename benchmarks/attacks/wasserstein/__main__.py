"""Accuracy under Wasserstein attacks by eps: ours, and those published, repaired so that cost, mass and bounds hold.

    python -m benchmarks.attacks.wasserstein --data folder                # holds mnist.npz
    python -m benchmarks.attacks.wasserstein --quick                      # scikit-learn's digits, only to see that it runs

Every attack starts from the same clean images. What an attack returned counts if :func:`wasserstein_feasibility` says that all
constraints hold to 1e-5. Those published leave the bounds, so their plans go through the library's own repair, in two ways, of which each
image keeps the worse; their accuracy without any repair and after clamping is shown for comparison, though the images are not legal.
How much of its budget ours spends is asked of images that it worked on to the end: those that resisted, and the first ones without early exit.
Each part is stored in ``--work`` when it is done.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks.wasserstein.peers import PEERS, repaired, without_room
from benchmarks.attacks.wasserstein.report import markdown, plot
from benchmarks.shared.accuracy import fooled
from benchmarks.shared.classifiers import add_arguments, identity, seeds, trained
from benchmarks.shared.data import Splits, load
from benchmarks.shared.files import kept, short_hash, sweep, write_atomically, write_text
from benchmarks.shared.machine import command, hardware
from benchmarks.shared.protocol import Protocol
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import WassersteinAttack, wasserstein_feasibility
from lightning_wdefense.attacks.wasserstein.local_transport import LocalTransport, square

OURS = "ours"
TOLERANCE = 1e-5
NEIGHBOURHOOD = 5


def measure(
    name: str, network: nn.Module, x: Tensor, y: Tensor, eps: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Which images an attack broke, whether its images are legal, and what it took."""
    threat = ThreatModel(norm="wasserstein", eps=eps)
    start = time.perf_counter()
    if name == OURS:
        attack = WassersteinAttack(threat, steps=options.steps, early_exit=True)
        candidates = [attack(network, x, y)]
        seconds = time.perf_counter() - start
        raw = spent(attack, candidates[0], network, x, y, options.checked)
    else:
        transport = LocalTransport.of(x, eps * x.sum((1, 2, 3)), torch.ones_like(x), square(NEIGHBOURHOOD, 1))
        plans = PEERS[name](network, y, without_room(transport), options.peer_steps)
        seconds = time.perf_counter() - start
        images = [transport.transported(plan) for plan in plans]
        raw = {
            "raw": _broken(network, images, y),
            "clamped": _broken(network, [each.clamp(0, 1) for each in images], y),
            "brightest": max(float(each.max()) for each in images),
        }
        candidates = [each for plan in plans for each in repaired(transport, plan)]
    found = [wasserstein_feasibility(x[: options.checked], each[: options.checked], threat) for each in candidates]
    return {
        "broken": _broken(network, candidates, y),
        "seconds": seconds,
        "cost": max(float((each.cost / eps).max()) for each in found),
        "mass": max(float(each.mass.max()) for each in found),
        "box": max(float((each - 1).max()) for each in candidates),
        "feasible": all(bool(each.feasible(eps, TOLERANCE).all()) for each in found),
        **raw,
    }


def spent(
    attack: WassersteinAttack, adversarial: Tensor, network: nn.Module, x: Tensor, y: Tensor, checked: int
) -> dict[str, list[float]]:
    """Exact costs, in eps, of images that the attack worked on to its end."""

    def costs(clean: Tensor, moved: Tensor) -> list[float]:
        return (wasserstein_feasibility(clean, moved, attack.threat).cost / attack.threat.eps).tolist()

    resist = ~fooled(network, adversarial, y)
    thorough = replace(attack, early_exit=False)(network, x[:checked], y[:checked])
    return {
        "resisting": costs(x[resist], adversarial[resist]) if bool(resist.any()) else [],
        "thorough": costs(x[:checked], thorough),
    }


def _broken(network: nn.Module, candidates: list[Tensor], y: Tensor) -> list[bool]:
    """The worst case of each image."""
    return torch.stack([fooled(network, each, y) for each in candidates]).any(0).tolist()


def cells(data: Splits, options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    x, y = (part[: options.images] for part in data.test)
    for model in options.models:
        for seed in seeds(model, options):
            network = trained(model, seed, data, options).requires_grad_(False)
            clean = fooled(network, x, y).tolist()
            for eps in options.epsilons:
                for name in (OURS, *PEERS):
                    steps = options.steps if name == OURS else options.peer_steps
                    place = identity(model, seed, data, options) | {
                        "attack": name, "eps": eps, "steps": steps, "images": options.images, "checked": options.checked,
                    }  # fmt: skip
                    path = options.work / "wasserstein" / f"{short_hash(place)}.json"
                    cell = kept(path, partial(measure, name, network, x, y, eps, options))
                    found.append(cell := place | cell | {"clean": clean})
                    print(
                        f"{model}, seed {seed}, eps {eps:g}, {name}: {1 - sum(cell['broken']) / len(y):.1%} left, "
                        f"{cell['seconds']:.0f} s, legal: {cell['feasible']}", flush=True,
                    )  # fmt: skip
    return found


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks.wasserstein", description=__doc__.splitlines()[0]
    )
    add_arguments(parser, dataset="mnist")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3, 0.5, 1.0])
    parser.add_argument("--images", type=int, default=100, help="test images that are attacked")
    parser.add_argument("--checked", type=int, default=20, help="of them, whose transport cost is found anew")
    parser.add_argument("--steps", type=int, default=40, help="of each run of ours, of which there are four")
    parser.add_argument("--peer-steps", type=int, default=50)
    options = parser.parse_args(argv)
    if options.quick:
        options.dataset, options.train, options.validation, options.test, options.epochs = "digits", 800, 100, 100, 3
        options.seeds, options.images, options.checked, options.steps, options.peer_steps = [1], 30, 5, 5, 5
        options.epsilons = [0.1, 0.5]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    warnings.filterwarnings("ignore")
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    sweep(options.work, below=True)
    protocol = Protocol(options.dataset, options.train, options.validation, options.test, 0.0, options.epochs, 128)
    result = {
        "environment": {
            "command": command("attacks.wasserstein", sys.argv[1:] if argv is None else argv),
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            **{
                name: getattr(options, name)
                for name in ("dataset", "images", "checked", "steps", "peer_steps", "seeds")
            },
        },
        "cells": cells(load(protocol, options.data), options),
    }
    stem = options.output / f"wasserstein_attacks_{options.dataset}"
    write_atomically(stem.with_suffix(".json"), result, indent=None)
    write_text(stem.with_suffix(".md"), text := markdown(result, OURS))
    plot(result, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
