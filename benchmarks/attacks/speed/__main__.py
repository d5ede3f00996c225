"""What PGD-10 costs beside its bare passes, here, in torchattacks and in Foolbox; and what runs it faster, at what price.

    python -m benchmarks.attacks.speed --output benchmarks/results

Times: every side attacks the same batch with the same model, steps and step size, in turns within one run. "Bare passes" are 10
forward passes and as many backward passes to the inputs, and nothing else. Quality: a model trained adversarially on scikit-learn's
digits (or on MNIST, ``--data``) is attacked with each option. Training: the same small network is trained with each option by a
hand-written loop, and its robust accuracy is what PGD, APGD-CE and APGD-T leave; the seeds are paired.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import foolbox
import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor, nn

from benchmarks.shared.files import write_atomically, write_text
from benchmarks.shared.machine import hardware
from benchmarks.shared.models import mnist_cnn
from benchmarks.shared.statistics import ratio_interval
from lightning_wdefense.attacks import PGD, Execution, ThreatModel, get_attack, worst_case

STEPS = 10
DIGITS_EPS = 0.2
EPOCHS, WARMUP = 6, 3
"""Of the schedule whose saved steps are counted: the radius, and with it the steps, grow over the warm-up."""
OPTIONS: dict[str, tuple[dict[str, Any], Execution]] = {
    "plain": ({}, Execution()),
    "bf16": ({}, Execution(precision="bf16")),
    "channels_last": ({}, Execution(channels_last=True)),
    "compile": ({}, Execution(compile=True)),
    "bf16 + channels_last": ({}, Execution(precision="bf16", channels_last=True)),
    "bf16 + channels_last + compile": ({}, Execution("bf16", channels_last=True, compile=True)),
    "early_exit": ({"early_exit": True}, Execution()),
    "bf16 + early_exit": ({"early_exit": True}, Execution(precision="bf16")),
}
TRAINED = "plain", "bf16", "early_exit", "bf16 + early_exit", "scheduled steps"


def wide_cnn(width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "MNIST CNN, 128 x 1 x 28 x 28": (mnist_cnn, (128, 1, 28, 28), 0.1),
    "wide CNN with BatchNorm, 64 x 3 x 32 x 32": (wide_cnn, (64, 3, 32, 32), 8 / 255),
}
Side = Callable[[nn.Module, Tensor, Tensor, float], Any]


def bare_passes(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
    for _ in range(STEPS):
        point = x.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)


def of_torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    return torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)(x, y)


def of_foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    peer = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    return foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=STEPS).run(peer, x, y, epsilon=eps)


def ours(name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    fields, execution = OPTIONS[name]
    attack = PGD(ThreatModel(eps=eps), steps=STEPS, step_size=eps / 4, **fields)
    return attack(model, x, y, execution=execution)


def in_turns(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side's calls; the first round warms up (and compiles)."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in seconds.items()}


def times(sides: dict[str, Side], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model and side, with the ratio to the first side."""
    rows = []
    for title, (build, shape, eps) in MODELS.items():
        torch.manual_seed(0)
        model = build().eval().to(options.device)
        x, y = torch.rand(shape, device=options.device), torch.randint(10, shape[:1], device=options.device)
        found = in_turns({name: partial(side, model, x, y, eps) for name, side in sides.items()}, options.rounds, options.device)  # fmt: skip
        reference = next(iter(found.values()))
        for name, each in found.items():
            rows.append(
                {
                    "model": title,
                    "side": name,
                    "ms": round(1e3 * statistics.median(each), 2),
                    "ratio": round(statistics.median(each) / statistics.median(reference), 3),
                    "interval_95": ratio_interval(each, reference),
                }
            )
    return rows


def images(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Training and test images in [0, 1] with their labels, and the radius that they are attacked with."""
    if options.data:
        from torchvision.datasets import MNIST

        parts = [MNIST(options.data, train=train) for train in (True, False)]
        (x, y), (test_x, test_y) = ((part.data.float().unsqueeze(1) / 255, part.targets) for part in parts)
        return *(part.to(options.device) for part in (x[:5000], y[:5000], test_x[:1000], test_y[:1000])), 0.2
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order].to(options.device) / 16
    y = torch.tensor(digits.target)[order].to(options.device)
    return x[:1297], y[:1297], x[1297:], y[1297:], DIGITS_EPS


def scheduled_steps(epoch: int, warmup: int) -> int:
    """K grows with the radius, over the warm-up."""
    return round(STEPS * min(1.0, (epoch + 1) / warmup))


def train(option: str, data: Sequence[Tensor], eps: float, seed: int, epochs: int) -> tuple[nn.Module, float]:
    """A small network, trained on PGD's examples alone, and the seconds that it took."""
    x, y = data
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10),
    ).to(x.device)  # fmt: skip
    model(x[:1])  # sizes the lazy layer
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fields, execution = OPTIONS.get(option, OPTIONS["plain"])
    generator = torch.Generator(x.device).manual_seed(seed)
    warmup, start = epochs // 2, time.perf_counter()
    for epoch in range(epochs):
        radius = eps * min(1.0, (epoch + 1) / warmup)
        steps = scheduled_steps(epoch, warmup) if option == "scheduled steps" else STEPS
        attack = PGD(ThreatModel(eps=radius), steps=steps, **fields)
        for index in torch.randperm(len(x)).split(64):
            adversarial = attack(model, x[index], y[index], generator=generator, execution=execution)
            optimizer.zero_grad()
            F.cross_entropy(model(adversarial), y[index]).backward()
            optimizer.step()
    return model.eval(), time.perf_counter() - start


def quality(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[dict[str, Any]]:
    """How strong the adversaries of each option are on one robust model."""
    rows = []
    for name in OPTIONS:
        adversarial = ours(name, model, x, y, eps)
        with torch.no_grad():
            outputs = model(adversarial)
        rows.append(
            {
                "option": name,
                "misclassified": round(float((outputs.argmax(1) != y).float().mean()), 4),
                "mean_loss": round(float(F.cross_entropy(outputs, y)), 4),
            }
        )
    return rows


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Clean, after PGD, and after PGD, APGD-CE and APGD-T together, in percent."""
    threat = ThreatModel(eps=eps)
    attacks = {
        "pgd": PGD(threat, steps=20),
        **{part: get_attack(part, threat, steps=20) for part in ("apgd-ce", "apgd-t")},
    }
    found = worst_case(model, attacks, x, y)
    right = {"clean": found.clean == y, "pgd": found.adversarial["pgd"] == y, "apgd": found.robust}
    return {name: 100 * float(each.float().mean()) for name, each in right.items()}


def mean_interval(values: Sequence[float], draws: int = 5000) -> list[float]:
    """95% bootstrap interval of the mean."""
    data = torch.tensor(values)
    index = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(0))
    return [round(float(q), 2) for q in torch.quantile(data[index].mean(1), torch.tensor([0.025, 0.975]))]


def trainings(data: tuple[Tensor, Tensor, Tensor, Tensor, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each option; differences are to plain training with the same seed."""
    x, y, test_x, test_y, eps = data
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TRAINED}
    for seed in range(options.seeds):
        for name in TRAINED:
            model, seconds = train(name, (x, y), eps, seed, options.epochs)
            found[name].append(
                {"seconds": seconds, **robust_accuracy(model, test_x[: options.tested], test_y[: options.tested], eps)}
            )
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"option": name}
        for key in ("clean", "pgd", "apgd"):
            difference = [run[key] - plain[key] for run, plain in zip(runs, found["plain"], strict=True)]
            row |= {
                key: round(statistics.mean(run[key] for run in runs), 2),
                f"{key}_difference": round(statistics.mean(difference), 2),
                f"{key}_difference_95": mean_interval(difference),
            }
        seconds = [statistics.median(run["seconds"] for run in each) for each in (runs, found["plain"])]
        rows.append(row | {"seconds": round(seconds[0], 2), "seconds_ratio": round(seconds[0] / seconds[1], 3)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = [key.replace("_", " ").replace(" 95", ", 95%") for key in rows[0]]
    shown = [
        [" to ".join(map(str, value)) if isinstance(value, list) else str(value) for value in row.values()]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *shown])


def report(result: dict[str, Any]) -> str:
    about = result["environment"]
    return (
        f"# {__doc__.splitlines()[0]}\n\n`{about['command']}`, on {about['hardware']}, torch {about['torch']}, "
        f"torchattacks {about['torchattacks']}, foolbox {about['foolbox']}. Milliseconds are medians of {about['rounds']} calls in "
        "turns; intervals are 95% bootstrap intervals.\n\n"
        f"## PGD-{STEPS} in float32, against its bare passes\n\n{table(result['peers'])}\n"
        f"## What each option brings, against plain\n\nThe models are untrained, so that `early_exit` shows its best case: hardly "
        f"any sample is right. What it saves in training is in the last table.\n\n{table(result['options'])}\n"
        f"Steps that grow with the radius: over {EPOCHS} epochs with a warm-up of {WARMUP} they are "
        f"{result['saved_steps']:.1%} fewer.\n\n"
        f"## The adversaries, on a robust network ({about['data']})\n\n{table(result['quality'])}\n"
        f"## Trained with each option ({about['data']}, {about['seeds']} seeds, {about['epochs']} epochs)\n\n"
        f"Accuracies in percent on {about['tested']} test images; `apgd` is what PGD-20, APGD-CE and APGD-T (20 steps each) leave together. "
        f"Differences are to plain training with the same seed.\n\n{table(result['training'])}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="cores that every side may use")
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each side")
    parser.add_argument("--seeds", type=int, default=4, help="trainings with each option")
    parser.add_argument("--epochs", type=int, default=8, help="of each training")
    parser.add_argument("--tested", type=int, default=300, help="test images that each trained network is attacked on")
    parser.add_argument("--data", type=Path, help="folder of torchvision's MNIST; scikit-learn's digits if absent")
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seeds, options.epochs, options.tested = 1, 1, 2, 30
    return options


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    data = images(options)
    peers = {
        "bare passes": bare_passes,
        "ours": partial(ours, "plain"),
        "torchattacks": of_torchattacks,
        "Foolbox": of_foolbox,
    }
    if options.quick:
        del OPTIONS["compile"], OPTIONS["bf16 + channels_last + compile"]
    robust, _ = train("plain", data[:2], data[4], 0, options.epochs)
    result = {
        "environment": {
            "command": f"python -m benchmarks.attacks.speed --device {options.device} --threads {options.threads}",
            "hardware": hardware(options.device),
            "torch": torch.__version__,
            "torchattacks": torchattacks.__version__,
            "foolbox": foolbox.__version__,
            "data": "MNIST" if options.data else "scikit-learn's digits",
            **{name: getattr(options, name) for name in ("rounds", "seeds", "epochs", "tested")},
        },
        "peers": times(peers, options),
        "options": times({name: partial(ours, name) for name in OPTIONS}, options),
        "saved_steps": 1 - sum(scheduled_steps(epoch, WARMUP) for epoch in range(EPOCHS)) / (EPOCHS * STEPS),
        "quality": quality(robust, data[2], data[3], data[4]),
        "training": trainings(data, options),
    }
    name = f"attack_speed_{options.device}"
    write_atomically(options.output / f"{name}.json", result, indent=2)
    write_text(options.output / f"{name}.md", report(result))
    print(report(result))


if __name__ == "__main__":
    main()
