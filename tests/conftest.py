"""Fixtures shared by the whole suite."""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import support.lightning_alias  # noqa: F401
import torch
from _pytest.doctest import DoctestModule
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_wdefense.attacks import PGD, ThreatModel

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: more threads would only wait for each other, in the processes that tests start as well.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[Any], list[Any]]:
    """Doctests are the package's alone.

    With ``--doctest-ignore-import-errors`` a file of tests that cannot be imported would be skipped as a doctest, and its second import,
    as tests, find a module without any: all its tests would be gone without an error.
    """
    return [each for each in (yield) if not isinstance(each, DoctestModule)]


@pytest.fixture(scope="session", autouse=True)
def _entry_points_are_read_once() -> Iterator[None]:
    """Each Trainer reads the metadata of all packages that are installed, in ten milliseconds: a third of a short training."""
    from lightning.fabric.utilities import registry  # here, because above there may be no such name yet

    with pytest.MonkeyPatch.context() as patch:
        if hasattr(registry, "entry_points"):
            patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        yield


DIGITS_EPS = 0.2
"""L-infinity radius that the robust model of ``digits_cnn`` was trained for; the digits lie in [0, 1]."""


def train_digits_cnn(inputs: Tensor, labels: Tensor, attack: PGD | None, epochs: int) -> nn.Module:
    """A small CNN, trained on adversarial inputs if there is an attack (its radius ramped up over the first half)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for index in torch.randperm(len(inputs)).split(64):
            x, y = inputs[index], labels[index]
            if attack is not None:
                x = attack.with_eps(attack.threat.eps * min(1.0, 2 * (epoch + 1) / epochs))(model, x, y)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def digits_cnn() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """``(plain, robust, test_x, test_y)``: two small CNNs on 8x8 digits, one trained against PGD with eps 0.2."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    with torch.random.fork_rng(devices=[]):
        plain = train_digits_cnn(images[train], labels[train], None, epochs=8)
        pgd = PGD(ThreatModel(norm="linf", eps=DIGITS_EPS), steps=5)
        robust = train_digits_cnn(images[train], labels[train], pgd, epochs=16)
    return plain, robust, images[test], labels[test]
