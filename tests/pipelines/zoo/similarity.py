"""Embeddings, compared."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import digit_loaders, generator, loaders, stack
from pipelines.pipeline import Pipeline, accuracy
from pipelines.zoo.classification import mlp
from support.lightning_modules import digits
from torch import Tensor, nn

from lightning_wdefense import ThreatModel


class Embedder(L.LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.net = mlp(width)

    def forward(self, x):
        return F.normalize(self.net(x), dim=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


class HardTriplets(Embedder):
    """The furthest of the same class and the nearest of another, in the batch."""

    def loss(self, z, y):
        distance = torch.cdist(z, z)
        same = y[:, None] == y[None]
        furthest = distance.masked_fill(~same, -1).amax(1)
        nearest = distance.masked_fill(same, 9).amin(1)
        return F.softplus(4 * (furthest - nearest)).mean()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_triplet", self.loss(self(x), y))


class Siamese(Embedder):
    """Two images: do they show the same digit?"""

    def forward(self, first, second):
        distance = (self.net(first) - self.net(second)).square().sum(1)
        return 2 - distance

    def training_step(self, batch, batch_idx):
        first, second, same = batch
        return F.binary_cross_entropy_with_logits(self(first, second), same)

    def validation_step(self, batch, batch_idx):
        first, second, same = batch
        self.log("val_acc", ((self(first, second) > 0) == same.bool()).float().mean())


class ArcFace(Embedder):
    """The head takes the labels: ``forward(x, y)``."""

    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(10, 16))

    def cosines(self, x):
        return F.normalize(self.net(x), dim=1) @ F.normalize(self.prototypes, dim=1).T

    def forward(self, x, y):
        cosines = self.cosines(x).clamp(-0.999, 0.999)
        with_margin = torch.cos(cosines.acos() + 0.2)
        return 10 * torch.where(F.one_hot(y, 10).bool(), with_margin, cosines)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x, y), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x, y), y))
        self.log("val_acc", (self.cosines(x).argmax(1) == y).float().mean())


class SimCLR(Embedder):
    """Two views of each image, made by the loader: ``((first, second), y)``."""

    def nt_xent(self, first, second):
        z = torch.cat([self(first), self(second)])
        similarity = (z @ z.T / 0.3).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
        return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(first)))

    def training_step(self, batch, batch_idx):
        (first, second), _ = batch
        return self.nt_xent(first, second)

    def validation_step(self, batch, batch_idx):
        (first, second), _ = batch
        self.log("val_contrast", self.nt_xent(first, second), batch_size=len(first))


def pair_loaders() -> tuple[Any, Any]:
    """Half of the pairs are of the same digit."""
    images, labels = digits()
    images, labels = images[:800], labels[:800]
    draw = generator()
    partner = torch.randint(0, 600, (800,), generator=draw)
    partner[600:] = torch.randint(600, 800, (200,), generator=draw)
    for row in range(0, 800, 2):
        start, stop = (0, 600) if row < 600 else (600, 800)
        alike = (labels[start:stop] == labels[row]).nonzero().squeeze(1) + start
        partner[row] = alike[int(torch.randint(0, len(alike), (), generator=draw))]
    order = torch.cat([torch.randperm(600, generator=draw), 600 + torch.randperm(200, generator=draw)])
    same = (labels == labels[partner]).float()
    return loaders(images[order], images[partner][order], same[order])


def view_loaders(nested: bool = True) -> tuple[Any, Any]:
    images, labels = digits()
    draw = generator()
    views = [
        (images.roll(shift, dims=3) + 0.05 * torch.randn(images.shape, generator=draw)).clamp(0, 1) for shift in (0, 1)
    ]

    def collate(rows: list) -> Any:
        first, second, y = stack(rows)
        return (first, second), y

    return loaders(*views, labels, collate=collate if nested else None)


def triplet_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    z, y = F.normalize(module.net(x), dim=1), batch[1]
    distance = (z[:, None] - z[None]).square().sum(2).clamp_min(1e-12).sqrt()
    same = y[:, None] == y[None]
    furthest = torch.where(same, distance, -1).amax(1)
    nearest = torch.where(same, 9, distance).amin(1)
    return F.softplus(4 * (furthest - nearest)).mean()


def siamese_logits(module: Any, x: list[Tensor]) -> Tensor:
    return 2 - (module.net(x[0]) - module.net(x[1])).square().sum(1)


def siamese_loss(module: Any, batch: Any, x: list[Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(siamese_logits(module, x), batch[2], reduction="none")


def arcface_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(module(x, batch[1]), batch[1], reduction="none")


def contrast(module: Any, batch: Any, x: list[Tensor]) -> Tensor:
    first, second = (F.normalize(module.net(view), dim=1) for view in x)
    n = len(first)
    own = torch.eye(n, dtype=torch.bool)
    losses = []
    for one, other in ((first, second), (second, first)):
        logits = torch.cat([one @ other.T, (one @ one.T).masked_fill(own, -1e9)], 1) / 0.3
        losses.append(F.cross_entropy(logits, torch.arange(n), reduction="none"))
    return (losses[0] + losses[1]) / 2


PIPELINES = [
    Pipeline(
        "hard_triplets",
        "metric learning",
        HardTriplets,
        digit_loaders,
        triplet_loss,
        lambda module, batch, x: triplet_loss(module, batch, x).item(),
        metric="val_triplet",
        better="lower",
        tolerance=0.15,
        threat=ThreatModel(eps=0.08),
        gain=0.06,
    ),
    Pipeline(
        "siamese",
        "metric learning",
        Siamese,
        pair_loaders,
        siamese_loss,
        lambda module, batch, x: ((siamese_logits(module, x) > 0) == batch[2].bool()).float().mean().item(),
        clean_inputs=lambda module, batch: [batch[0], batch[1]],
        threat=ThreatModel(eps=0.06),
        arguments={"inputs": [0, 1]},
        epochs=15,
        gain=0.26,
    ),
    Pipeline(
        "arcface",
        "metric learning",
        ArcFace,
        digit_loaders,
        arcface_loss,
        lambda module, batch, x: accuracy(module.cosines(x), batch[1]),
        gain=0.17,
    ),
    Pipeline(
        "simclr",
        "self-supervised",
        SimCLR,
        view_loaders,
        contrast,
        lambda module, batch, x: contrast(module, batch, x).mean().item(),
        clean_inputs=lambda module, batch: list(batch[0]),
        metric="val_contrast",
        better="lower",
        tolerance=0.15,
        gain=0.08,
    ),
]
