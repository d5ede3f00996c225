"""How far a critic's W_1 is from the truth, over learning rates, steps a batch and penalties: ours, and plain WGAN-GP.

    python benchmarks/critic_sensitivity.py --output benchmarks/results
    python benchmarks/critic_sensitivity.py --accuracy-seeds 3                              # robust accuracy as well: critic_accuracy.py
    python benchmarks/critic_sensitivity.py --accuracy-seeds 3 --dataset mnist --data DIR   # of the central decade of learning rates

Two Gaussians of unit variance, one moved by a vector of length 1: ``W_1`` is 1 in any dimension. Every batch is fresh. Each critic sees the
same number of batches, and its figure is what it says of the last quarter of them before it learns from each. The peer is the critic of Gulrajani et
al. (2017) as published: ReLU, a two-sided penalty of 10, Adam with betas (0, 0.9) and a constant rate, 5 steps a batch; its figure is the gap.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import critic_accuracy
import critic_accuracy_report
import torch
from _common import hardware
from _files import alone, read, replacing, write_atomically, write_text
from critic_accuracy import PENALTIES, RATES, STEPS
from torch import Tensor, nn

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


def markdown(results: dict[str, dict[str, list[float]]], seeds: int, machine: str) -> str:
    """Errors in per cent, a row for each setting, and what follows."""
    columns = [(name, dim) for name in ("ours", "plain WGAN-GP") for dim in DIMENSIONS]
    lines = [
        "# Critics on Gaussians whose distance is 1: error of W_1 in per cent",
        "",
        f"Mean error over {seeds} seeds (the standard error of a figure from sampling alone is about 1). Learning rates in multiples of "
        f"{OURS_LR} (ours) and {PEER_LR:g} (plain). For ours `penalty` means the gradient penalty in place of orthonormal layers, and "
        "`steps` the most that it may take on a batch.",
        "",
        "| setting | " + " | ".join(f"{name}, {dim}-D" for name, dim in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    settings = list(dict.fromkeys(key.split("|")[1] for key in results))
    for setting in settings:
        row = [f"{100 * _error(results, name, setting, dim):+.1f}" for name, dim in columns]
        lines.append(f"| {setting} | " + " | ".join(row) + " |")
    central = [f"lr x {rate:.3g}" for rate in RATES[2:5]]
    for name in ("ours", "plain WGAN-GP"):
        worst = max(abs(_error(results, name, setting, dim)) for setting in central for dim in DIMENSIONS)
        verdict = "within" if worst <= 0.05 else "not within"
        lines += [
            "",
            f"Over the central decade of learning rates the worst error of {name} is {100 * worst:.1f}%: {verdict} 5%.",
        ]
    command = "python benchmarks/critic_sensitivity.py --output benchmarks/results"
    return "\n".join([*lines, "", f"{BATCHES} batches of {SIZE} points. `{command}` on {machine}.", ""])


def _error(results: dict[str, dict[str, list[float]]], name: str, setting: str, dim: int) -> float:
    values = results[f"{name}|{setting}"][str(dim)]
    return sum(values) / len(values) - 1


def plot(results: dict[str, dict[str, list[float]]], accuracies: dict[str, Any], path: Path) -> None:
    """Heat map of the errors, beside that of the accuracies where there are some."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [(name, dim) for name in ("ours", "plain WGAN-GP") for dim in DIMENSIONS]
    settings = list(dict.fromkeys(key.split("|")[1] for key in results))
    table = [[100 * _error(results, name, setting, dim) for name, dim in columns] for setting in settings]
    if accuracies:
        figure, (axes, beside) = plt.subplots(1, 2, figsize=(13, 6.5), width_ratios=(2, 1), layout="constrained")
        critic_accuracy_report.draw(beside, accuracies["digits"]["results"])
    else:
        figure, axes = plt.subplots(figsize=(8, 6.5), layout="constrained")
    image = axes.imshow(table, cmap="RdBu", vmin=-50, vmax=50, aspect="auto")
    axes.set_xticks(range(len(columns)), ["\n".join([*name.split(), f"{dim}-D"]) for name, dim in columns])
    axes.set_yticks(range(len(settings)), settings)
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:+.1f}", ha="center", va="center", color="white" if abs(value) > 30 else "black")
    axes.set_title("error of the critic's W_1, per cent")
    figure.colorbar(image, ax=axes)
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--accuracy-seeds", type=int, default=0, help="runs of each setting of recipe critic")
    parser.add_argument("--dataset", choices=("digits", "mnist"), default="digits", help="of the accuracy")
    parser.add_argument("--data", type=Path, help="folder that holds mnist.npz; digits need none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "critic_sensitivity"
    beside, machine = options.output / "critic_accuracy.json", hardware("cpu")
    with alone(path := stem.with_suffix(".json")):
        measured_on, results = complete(path, options.seeds, machine)
        if options.accuracy_seeds:
            critic_accuracy.measure(beside, options.accuracy_seeds, options.dataset, options.data, machine)
    accuracies = read(beside)
    plot(results, accuracies, stem.with_suffix(".png"))
    text = markdown(results, options.seeds, measured_on)
    if accuracies:
        text += "\n" + critic_accuracy_report.markdown(accuracies)
    write_text(stem.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
