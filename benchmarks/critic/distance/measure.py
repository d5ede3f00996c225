"""What critics say of the distance between two Gaussians, over their settings: ours, and plain WGAN-GP."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.critic.accuracy.measure import PENALTIES, RATES, STEPS
from benchmarks.shared.files import read, write_atomically
from lightning_wdefense.transport import CriticTraining, WassersteinCritic

BATCHES, SIZE, WIDTH, DEPTH = 500, 256, 128, 2
DIMENSIONS = (2, 16, 128)
OURS_LR, PEER_LR = 0.05, 1e-4
Draw = Callable[[], tuple[Tensor, Tensor]]


def sampler(dim: int, seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(dim, generator=generator)
    shift /= shift.norm()
    return lambda: (
        torch.randn(SIZE, dim, generator=generator) + shift,
        torch.randn(SIZE, dim, generator=generator),
    )


def ours(dim: int, seed: int, *, rate: float, steps: int = 1, penalty: float | None = None) -> float:
    """With a rate that falls to 0; ``penalty`` for the gradient penalty in place of orthonormal layers; ``steps`` is the most it may take."""
    kept = {} if penalty is None else {"lipschitz": "gradient-penalty", "penalty": penalty}
    critic = WassersteinCritic(dim, width=WIDTH, depth=DEPTH, seed=seed, **kept)
    training = CriticTraining(critic, lr=OURS_LR * rate, max_steps=steps)
    draw, said = sampler(dim, seed), []
    for index in range(BATCHES):
        for group in training.optimizer.param_groups:
            group["lr"] = OURS_LR * rate * (1 - index / BATCHES)
        said.append(float(training.update(*draw()).distance))
    return mean_of_last_quarter(said)


def plain(dim: int, seed: int, *, rate: float, steps: int = 5, penalty: float = 10.0) -> float:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for index in range(DEPTH):
        layers += [nn.Linear(WIDTH if index else dim, WIDTH), nn.ReLU()]
    critic = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=PEER_LR * rate, betas=(0.0, 0.9))
    draw, said = sampler(dim, seed), []
    for _ in range(BATCHES):
        x, y = draw()
        for step in range(steps):
            gap = critic(x).mean() - critic(y).mean()
            if step == 0:
                said.append(float(gap.detach()))
            share = torch.rand(SIZE, 1)
            between = torch.lerp(x, y, share).requires_grad_()
            (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            loss = penalty * (gradient.norm(dim=1) - 1).square().mean() - gap
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return mean_of_last_quarter(said)


def mean_of_last_quarter(values: list[float]) -> float:
    last = values[-len(values) // 4 :]
    return sum(last) / len(last)


def cells() -> list[tuple[str, str, Callable[..., float], dict[str, float]]]:
    """Name of the critic, what is varied, the function and its settings."""
    found = []
    for name, run in (("ours", ours), ("plain WGAN-GP", plain)):
        found += [(name, f"lr x {rate:.3g}", run, {"rate": rate}) for rate in RATES]
        found += [(name, f"{steps} steps", run, {"rate": 1.0, "steps": steps}) for steps in STEPS]
        found += [(name, f"penalty {penalty:g}", run, {"rate": 1.0, "penalty": penalty}) for penalty in PENALTIES]
    return found


def complete(path: Path, seeds: int, machine: str) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """Measure what is not stored yet; the machine that began, and all results."""
    stored = read(path)
    # No times: another machine may go on.
    measured_on, results = stored.get("hardware", machine), stored.get("results", {})
    for name, setting, run, settings in cells():
        cell = results.setdefault(f"{name}|{setting}", {})
        for dim in DIMENSIONS:
            values = cell.setdefault(str(dim), [])
            if len(values) >= seeds:
                continue
            start = time.perf_counter()
            for seed in range(len(values), seeds):
                values.append(round(run(dim, seed, **settings), 4))
            write_atomically(path, {"hardware": measured_on, "results": results})
            print(f"{name}, {setting}, {dim}-D: {values} ({time.perf_counter() - start:.0f} s)", flush=True)
    return measured_on, results
