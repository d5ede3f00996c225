"""Memory and speed of a training over many steps: resident memory, live tensors, objects, and time of a step, in windows.

    OMP_NUM_THREADS=1 python -m benchmarks.scale.long_run --steps 20000

A small classifier is trained on random images, with WassersteinDefense (recipes ``class-transport`` and ``critic``, each its own training), a
RobustnessMonitor that measures after every epoch, and a logger. At the end of each window of steps, after a collection of
garbage, the process's resident memory and the numbers of live tensors and of objects are read. The time of a step is the median over its window
of the process's CPU time. Other programs change that as well, by what they leave of the caches and the cores. So it is divided by the time of
plain passes of the same network, which are run after every tenth step and know nothing of this package. The first windows are left out of the
slopes: in them caches fill. "flat" says that the whole 95% interval of the growth lies below a tolerance.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.scale.long_run.growth import Growth, growth
from benchmarks.shared.files import scratch, write_atomically, write_text
from benchmarks.shared.machine import command, hardware
from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

RECIPES = ("class-transport", "critic")
THREAT = ThreatModel(eps=0.1)
BATCH = 16
BATCHES_AN_EPOCH = 250
TOLERANCES = {"resident_mib": 0.02, "tensors": 0.01, "objects": 0.01, "step_to_passes": 0.05}
"""Growth over the windows that a measure may have and still be flat, as a share of its mean."""
LEFT_OUT = 0.2
"""Share of the windows, the first ones, that the slopes leave out."""


def network() -> nn.Module:
    """A small convolutional network for images ``(N, 1, 8, 8)`` of four classes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


class Classifier(L.LightningModule):
    """A small convolutional classifier that logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Windows(L.Callback):
    """Reads the process at the end of each window of steps."""

    def __init__(self, window: int) -> None:
        self.window, self.seen = window, []
        self._network, self._batch = network(), torch.rand(BATCH, 1, 8, 8)
        self._cpu: list[float] = []
        self._passes: list[float] = []
        self._wall = time.perf_counter()

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self._cpu.append(time.process_time() - self._start)
        if len(self._cpu) % 10 == 0:
            self._passes.append(self._plain_passes())
        if len(self._cpu) < self.window:
            return
        wall = time.perf_counter() - self._wall
        gc.collect()
        objects = gc.get_objects()
        self.seen.append(
            {
                "resident_mib": resident_mib(),
                "tensors": sum(issubclass(type(each), Tensor) for each in objects),
                "objects": len(objects),
                "step_to_passes": statistics.median(self._cpu) / statistics.median(self._passes),
                "step_cpu_ms": 1e3 * statistics.median(self._cpu),
                "step_wall_ms": 1e3 * wall / self.window,
            }
        )
        del objects
        self._cpu, self._passes, self._wall = [], [], time.perf_counter()

    def _plain_passes(self) -> float:
        start = time.process_time()
        for _ in range(4):
            loss = self._network(self._batch).square().mean()
            torch.autograd.grad(loss, list(self._network.parameters()))
        return time.process_time() - start


def resident_mib() -> float:
    """Resident memory of this process, from Linux's ``/proc``."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def images(count: int, seed: int) -> TensorDataset:
    """Random images ``(N, 1, 8, 8)``, whose label says which of their quarters is bright."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = (
        0.5 * torch.rand(count, 1, 8, 8, generator=generator),
        torch.randint(4, (count,), generator=generator),
    )
    for quarter in range(4):
        row, column = 4 * (quarter // 2), 4 * (quarter % 2)
        pixels[labels == quarter, :, row : row + 4, column : column + 4] += 0.4
    return TensorDataset(pixels, labels)


def train(name: str, options: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """What was read at the end of each window."""
    L.seed_everything(options.seed, verbose=False)
    recipe = Recipe.named(name, THREAT, attack=PGD(THREAT, steps=options.attack_steps))
    windows = Windows(options.window)
    trainer = L.Trainer(
        max_steps=options.steps, max_epochs=-1, accelerator="cpu", devices=1, logger=CSVLogger(folder, name),
        callbacks=[WassersteinDefense(recipe), RobustnessMonitor(THREAT, progress=False), windows],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = min(BATCHES_AN_EPOCH, options.steps // 4)
    train_loader = DataLoader(images(BATCH * batches, options.seed), BATCH, shuffle=True)
    trainer.fit(Classifier(), train_loader, DataLoader(images(64, options.seed + 1), 64))
    return windows.seen


def slopes(windows: list[dict[str, float]]) -> dict[str, Growth]:
    """Growth of each measure from the first window that counts to the last."""
    counted = windows[int(LEFT_OUT * len(windows)) :]
    return {measure: growth([each[measure] for each in counted]) for measure in TOLERANCES}


def report(result: dict[str, Any]) -> str:
    """The tables of the page."""
    about = result["about"]
    lines = [
        f"# A training of {about['steps']:,} steps",
        "",
        f"`OMP_NUM_THREADS={about['threads']} {about['command']}`",
        "",
        f"Hardware {about['hardware']}, torch {about['torch']}, lightning {about['lightning']}; seed {about['seed']}, batches of {BATCH}, PGD-"
        f"{about['attack_steps']}, windows of {about['window']:,} steps, of which the slopes leave out the first {100 * LEFT_OUT:.0f}%. "
        "Growth is from the first window that counts to the last, as a share of the mean, by least squares, with its 95% interval.",
    ]
    for name, found in result["recipes"].items():
        lines += [
            "",
            f"## `{name}`",
            "",
            "| | mean | growth, % (95%) | tolerance, % | verdict |",
            "|---|---|---|---|---|",
        ]
        for measure, it in found["growth"].items():
            share, low, high = (100 * it[key] for key in ("share", "low", "high"))
            lines.append(
                f"| {measure.replace('_', ' ')} | {it['mean']:,.2f} | {share:+.2f} [{low:+.2f}, {high:+.2f}] | "
                f"{100 * TOLERANCES[measure]:g} | {it['verdict']} |"
            )
        first, last = (found["windows"][i] for i in (0, -1))
        lines += [
            "",
            f"First and last window: {first['resident_mib']:.1f} and {last['resident_mib']:.1f} MiB, {first['tensors']} and {last['tensors']} tensors, "
            f"{first['objects']:,} and {last['objects']:,} objects, "
            f"{first['step_cpu_ms']:.1f} and {last['step_cpu_ms']:.1f} ms of CPU time a step, {first['step_wall_ms']:.1f} and {last['step_wall_ms']:.1f} ms on the wall clock a step, "
            "validation included.",
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.long_run", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each training")
    parser.add_argument("--window", type=int, default=1_000, help="steps in a window")
    parser.add_argument("--attack-steps", type=int, default=2, help="gradient steps of the attack")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="RECIPE", help="names of recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    if options.steps < 6 * options.window:
        parser.error(
            f"--steps {options.steps} has fewer than 6 windows of {options.window} steps: no slope can be seen"
        )
    warnings.filterwarnings("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    recipes = {}
    for name in options.recipes:
        with scratch(options.output) as folder:
            windows = train(name, options, folder)
        found = {
            measure: {**it._asdict(), "verdict": it.verdict(TOLERANCES[measure])}
            for measure, it in slopes(windows).items()
        }
        recipes[name] = {"growth": found, "windows": windows}
    result = {
        "about": {
            "command": command("scale.long_run", sys.argv[1:] if argv is None else argv),
            "hardware": hardware("cpu"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "lightning": L.__version__,
            **{key: getattr(options, key) for key in ("steps", "window", "attack_steps", "seed")},
        },
        "recipes": recipes,
    }
    write_atomically(options.output / "long_run.json", result, indent=1)
    write_text(options.output / "long_run.md", report(result))
    print(report(result))
    return result


if __name__ == "__main__":
    main()
