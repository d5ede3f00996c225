"""What is measured of a loss: on the features of a classifier, and on clouds without pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gradients.losses import Draw, Loss, make_loss
from benchmarks.shared.data import Images, Splits
from benchmarks.shared.models import digits_cnn
from benchmarks.shared.protocol import Protocol
from lightning_wdefense.attacks import PGD

Measures = dict[str, float]


class Pairs(NamedTuple):
    """A classifier without its last layer, its images, and the same images attacked."""

    body: nn.Module
    clean: Tensor
    attacked: Tensor
    labels: Tensor

    def draw(self, size: int, seed: int) -> Draw:
        """Random batches of features."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            x, y = self.body(self.clean), self.body(self.attacked)

        def batch() -> tuple[Tensor, Tensor, Tensor]:
            chosen = torch.randperm(len(x), generator=generator)[:size]
            return x[chosen], y[chosen], self.labels[chosen]

        return batch


def trained_stages(splits: Splits, protocol: Protocol, seed: int, stages: Sequence[int]) -> dict[str, Pairs]:
    """A classifier after so many epochs, each trained undefended and adversarially (PGD, its radius growing over three epochs)."""
    found = {}
    for kind in ("undefended", "adversarial"):
        torch.manual_seed(seed)
        model = digits_cnn()
        optimizer = torch.optim.Adam(model.parameters(), lr=protocol.lr)
        attack = PGD(protocol.threat)
        for epoch in range(max(stages)):
            radius = min(1.0, (epoch + 1) / 4) * protocol.eps
            for batch in torch.randperm(len(splits.train.y)).split(protocol.batch_size):
                x, y = splits.train.x[batch], splits.train.y[batch]
                if kind == "adversarial":
                    x = attack.with_eps(radius)(model, x, y)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if epoch + 1 in stages:
                found[f"{kind}, {epoch + 1} epochs"] = _frozen_pairs(model, attack, splits.train)
    return found


def _frozen_pairs(model: nn.Sequential, attack: PGD, images: Images) -> Pairs:
    body = digits_cnn()
    body.load_state_dict(model.state_dict())
    return Pairs(body[:-1], images.x, attack(model, images.x, images.y), images.y)


class Truth(NamedTuple):
    """The gradient of a loss on all images at once, in the attacked features and in the parameters."""

    points: Tensor
    parameters: Tensor


def true_gradient(pairs: Pairs, name: str, seed: int, updates: int) -> Truth:
    """The one that counts as true where pairs are known."""
    draw = pairs.draw(64, seed + 1000)
    loss = make_loss(name, draw, updates=updates, seed=seed, reference=True)
    return Truth(*_through_model(pairs, loss, torch.arange(len(pairs.labels))))


def known_pairs(pairs: Pairs, truth: Truth, name: str, size: int, seed: int, updates: int, batches: int) -> Measures:
    """Of the gradients in the attacked features, and in the model's parameters, over at most so many disjoint minibatches."""
    loss = make_loss(name, pairs.draw(size, seed), updates=updates, seed=seed)
    count, generator = len(pairs.labels), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[: min(batches, count // size) * size]
    points, parameters = torch.zeros(2, *truth.points.shape), []
    for turn in range(2):  # each sample twice, in different company
        for batch in chosen[torch.randperm(len(chosen), generator=generator)].split(size):
            points[turn, batch], gradient = _through_model(pairs, loss, batch)
            if turn == 0:
                parameters.append(gradient)
    return {
        "points agree": mean_cosine(points[0, chosen], points[1, chosen]),
        "points true": mean_cosine(points[0, chosen], truth.points[chosen]),
        **_of_parameters(torch.stack(parameters), truth.parameters),
    }


def _through_model(pairs: Pairs, loss: Loss, batch: Tensor) -> tuple[Tensor, Tensor]:
    x, y = pairs.body(pairs.clean[batch]), pairs.body(pairs.attacked[batch])
    points, *parameters = torch.autograd.grad(loss(x, y, pairs.labels[batch]), [y, *pairs.body.parameters()])
    return points, torch.cat([each.flatten() for each in parameters])


class Clouds(NamedTuple):
    """Two sources of points of the same distribution, for which ``(size) -> (size, D)`` gives points not given before."""

    fixed: Callable[[int], Tensor]
    moving: Callable[[int], Tensor]


def gaussians(dim: int, seed: int) -> Clouds:
    generator = torch.Generator().manual_seed(seed)
    return Clouds(*[lambda size: torch.randn(size, dim, generator=generator)] * 2)


def feature_clouds(pairs: Pairs, images: Tensor, seed: int) -> tuple[Clouds, Clouds]:
    """Clean features of two disjoint sets of images, in units of a typical coordinate; a third of each to learn from, the rest to measure on."""
    with torch.no_grad():
        points = pairs.body(images)
    points = (points - points.mean(0)) / (points - points.mean(0)).square().mean().sqrt()
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]
    halves = points.chunk(2)
    generator = torch.Generator().manual_seed(seed)

    def resampled(pool: Tensor) -> Callable[[int], Tensor]:
        return lambda size: pool[torch.randperm(len(pool), generator=generator)[:size]]

    def once(pool: Tensor) -> Callable[[int], Tensor]:
        state = {"next": 0}

        def take(size: int) -> Tensor:
            state["next"] += size
            if state["next"] > len(pool):
                raise ValueError(f"Only {len(pool)} points to measure on, {state['next']} wanted.")
            return pool[state["next"] - size : state["next"]]

        return take

    third = [len(half) // 3 for half in halves]
    learn = Clouds(*(resampled(half[:count]) for half, count in zip(halves, third, strict=True)))
    return learn, Clouds(*(once(half[count:]) for half, count in zip(halves, third, strict=True)))


def fresh_samples(
    learn: Clouds, measure: Clouds, name: str, distance: float, size: int, seed: int, updates: int, probes: int
) -> Measures:
    """Of the gradients in points that have no partners, and in the affine map that made them, which should only shift.

    The moving cloud is ``z A + b`` with ``A`` the identity and ``b`` the shift, so that the true gradient is 0 in ``A`` and along ``b`` in ``b``.
    """
    dim = learn.fixed(1).shape[1]
    shift = torch.randn(dim, generator=torch.Generator().manual_seed(seed + 7))
    shift *= distance / shift.norm()
    labels = torch.zeros(size, dtype=torch.long)
    loss = make_loss(name, lambda: (learn.fixed(size), learn.moving(size) + shift, labels), updates=updates, seed=seed)
    truth = torch.cat([torch.zeros(dim * dim), shift])
    agree, true, pull, parameters = [], [], [], []
    for _ in range(probes):
        z, seen = measure.moving(size), []
        for turn in range(2):
            matrix, offset = torch.eye(dim, requires_grad=True), shift.clone().requires_grad_()
            y = z @ matrix + offset
            gradients = torch.autograd.grad(loss(measure.fixed(size), y, labels), [y, matrix, offset])
            seen.append(gradients[0])
            if turn == 0:
                parameters.append(torch.cat([gradients[1].flatten(), gradients[2]]))
        agree.append(mean_cosine(*seen))
        true.append(mean_cosine(seen[0], shift.expand_as(seen[0])))
        pull.append(float(seen[0].sum(0) @ shift / distance))
    return {
        "points agree": sum(agree) / probes,
        "points true": sum(true) / probes,
        "pull": sum(pull) / probes,
        **_of_parameters(torch.stack(parameters), truth),
    }


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Mean over rows."""
    return float(F.cosine_similarity(one, other, dim=1).mean())


def _of_parameters(gradients: Tensor, truth: Tensor) -> Measures:
    """Of gradients ``(B, P)`` over minibatches."""
    unit = F.normalize(gradients, dim=1)
    gram, count = unit @ unit.T, len(unit)
    norms, mean = gradients.norm(dim=1), gradients.mean(0)
    deviation = (gradients - mean).square().sum() / (count - 1)
    return {
        "parameters agree": float((gram.sum() - gram.trace()) / (count * (count - 1))),
        "parameters true": float(F.cosine_similarity(gradients, truth[None], dim=1).mean()),
        "noise": float(deviation.sqrt() / mean.norm()),
        "norm": float(norms.mean()),
        "norm spread": float(norms.std() / norms.mean()),
    }
