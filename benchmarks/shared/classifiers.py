"""The classifiers that ``benchmarks.detectability`` and ``benchmarks.attacks.wasserstein`` attack, trained once and kept in ``--work``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.shared.data import Splits
from benchmarks.shared.files import load, save, short_hash
from benchmarks.shared.models import NETWORKS
from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import Attack, get_attack

RADII = {"digits": {"linf": 0.2, "wasserstein": 0.2}, "mnist": {"linf": 0.3, "wasserstein": 0.2}}
"""That the defended models are trained for."""
MODELS: dict[str, Any] = {
    "undefended": None,
    "linf": ("pgd", "linf", {"steps": 10}),
    "wasserstein": ("wasserstein", "wasserstein", {"methods": "projected", "steps": 4, "restarts": 1}),
}
"""Attack, norm and options of adversarial training."""


def add_arguments(parser: argparse.ArgumentParser, dataset: str) -> None:
    """What both benchmarks are told: which models on which images, and where to keep them."""
    parser.add_argument("--dataset", choices=sorted(RADII), default=dataset)
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[3], help="models of each kind, or of each of --models in turn"
    )
    parser.add_argument("--train", type=int, default=20000, help="training images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--validation", type=int, default=400, help="images on which settings are chosen")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work/detectability"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="only see that it runs")


def seeds(model: str, options: argparse.Namespace) -> range:
    """Of the models of a kind.

    Raises:
        ValueError: if ``--seeds`` has neither one number nor one for each kind.
    """
    if len(options.seeds) not in (1, len(options.models)):
        raise ValueError(f"--seeds takes one number, or one for each of {options.models}, got {options.seeds}.")
    return range(options.seeds[0] if len(options.seeds) == 1 else options.seeds[options.models.index(model)])


def defence(model: str, dataset: str) -> Attack | None:
    if MODELS[model] is None:
        return None
    name, norm, settings = MODELS[model]
    return get_attack(name, ThreatModel(norm=norm, eps=RADII[dataset][norm]), **settings)


def identity(model: str, seed: int, data: Splits, options: argparse.Namespace) -> dict[str, Any]:
    """All that decides the weights."""
    settings = {name: getattr(options, name) for name in ("dataset", "train", "validation", "test", "epochs")}
    return {"model": model, "seed": seed, "data": data.fingerprint, **settings}


def trained(model: str, seed: int, data: Splits, options: argparse.Namespace) -> nn.Sequential:
    """The network, from the folder of an earlier run where there is one."""
    weights = options.work / short_hash(identity(model, seed, data, options)) / "weights.pt"
    if (state := load(weights)) is None:
        state = train(model, seed, data, options).state_dict()
        save(weights, state)
    network = NETWORKS[options.dataset]().to(options.device).eval()
    network.load_state_dict(state)
    return network


def train(model: str, seed: int, data: Splits, options: argparse.Namespace) -> nn.Sequential:
    """A network, trained on attacked images if it is a defended one; the radius grows over the first half of the epochs."""
    torch.manual_seed(seed)
    network, attack = NETWORKS[options.dataset]().to(options.device), defence(model, options.dataset)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, y = (part.to(options.device) for part in data.train)
    for epoch in range(options.epochs):
        for index in torch.randperm(len(x)).to(x.device).split(128):
            images, labels = x[index], y[index]
            if attack is not None:
                ramp = min(1.0, 2 * (epoch + 1) / options.epochs)
                images = attack.with_eps(attack.threat.eps * ramp)(network, images, labels)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval()
