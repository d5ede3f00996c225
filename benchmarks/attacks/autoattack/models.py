"""The models that are attacked, trained here or taken from the work folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shared.data import Images, Splits
from benchmarks.shared.models import digits_cnn, mnist_cnn
from lightning_wdefense.attacks import PGD, ThreatModel


@dataclass(frozen=True)
class Case:
    """A model and what it is attacked with.

    Attributes:
        dataset: ``"mnist"`` or ``"digits"``.
        threat: the threat model of the attacks.
        defended: whether it is trained on PGD's examples.
        epochs: of training.
        train: number of training images.
    """

    dataset: str
    threat: ThreatModel
    defended: bool
    epochs: int
    train: int


CASES = {
    "MNIST, pgd-at, L-inf 0.3": Case("mnist", ThreatModel(eps=0.3), True, 8, 20_000),
    "digits, pgd-at, L2 0.8": Case("digits", ThreatModel("l2", 0.8), True, 20, 1097),
    "MNIST, undefended, L-inf 0.1": Case("mnist", ThreatModel(eps=0.1), False, 2, 20_000),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {"mnist": mnist_cnn, "digits": digits_cnn}


def trained(case: Case, images: Images, epochs: int) -> nn.Module:
    """Plain training, or training on the examples of PGD alone, whose radius grows over the first half."""
    torch.manual_seed(0)
    model = NETWORKS[case.dataset]()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        radius = case.threat.eps * min(1.0, 2 * (epoch + 1) / epochs)
        attack = PGD(case.threat.with_eps(radius), steps=10)
        for index in torch.randperm(len(images.y), generator=generator).split(128):
            x, y = images.x[index], images.y[index]
            seen = attack(model, x, y, generator=generator) if case.defended else x
            optimizer.zero_grad()
            F.cross_entropy(model(seen), y).backward()
            optimizer.step()
    return model.eval()


def model_of(name: str, splits: Splits, work: Path, epochs: int | None) -> nn.Module:
    """The model of a case: from the work folder if it lies there, or else trained, and put there."""
    case = CASES[name]
    file = work / f"{'_'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}.pt"
    if file.is_file():
        model = NETWORKS[case.dataset]()
        weights: dict[str, Tensor] = torch.load(file, weights_only=True)
        model.load_state_dict(weights)
        return model.eval()
    model = trained(case, splits.train.first(case.train), epochs or case.epochs)
    torch.save(model.state_dict(), file)
    return model
