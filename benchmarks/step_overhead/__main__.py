"""What the callback adds to a training step: recipe ``pgd-at`` against a hand-written loop of the same passes, either way it goes.

    python -m benchmarks.step_overhead --output benchmarks/results

"through the model" takes plain forward passes in the attack, "through the step" calls ``training_step`` (here one that logs its loss and updates
a metric, and one that does not) as often. All sides train the same module in the same kind of Trainer, in alternating blocks of one run. The hand-written module does what
a careful user would write: K forward and backward passes for the attack in eval mode, one more for the step. A ratio of medians is
free of single slow steps; the ratio of means also holds what the callback measures every ``log_every_n_steps``.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.shared.files import scratch, write_atomically, write_text
from benchmarks.shared.machine import hardware
from benchmarks.shared.pgd import hand_written_pgd
from benchmarks.shared.statistics import ratio_interval
from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

warnings.filterwarnings("ignore")
EPS = 8 / 255


class Plain(L.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Logging(Plain):
    """A step as users write it, with a log and a metric."""

    def __init__(self, width):
        super().__init__(width)
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log_dict({"loss": loss, "accuracy": self.accuracy})
        return loss


class HandWritten(Plain):
    """Madry's adversarial training, written into the step."""

    def __init__(self, width, steps):
        super().__init__(width)
        self.steps = steps

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(hand_written_pgd(self, x, y, EPS, self.steps)), y)


class StepTimer(L.Callback):
    def __init__(self):
        self.seconds = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._synchronize(pl_module)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._synchronize(pl_module)
        self.seconds.append(time.perf_counter() - self._start)

    @staticmethod
    def _synchronize(module):
        if module.device.type == "cuda":
            torch.cuda.synchronize()


def block(module, callbacks, loader, folder):
    """Seconds of each step, without the first two, which warm up."""
    timer = StepTimer()
    trainer = L.Trainer(
        max_epochs=1, callbacks=[*callbacks, timer], logger=CSVLogger(folder), devices=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return timer.seconds[2:]


def passes(module, batch, repeats=10):
    """Median seconds of one forward and backward pass."""
    x, y = (part.to(module.device) for part in batch)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        F.cross_entropy(module(x.requires_grad_()), y).backward()
        StepTimer._synchronize(module)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="K, the attack's gradient steps")
    parser.add_argument("--width", type=int, default=24, help="channels of the first layer")
    parser.add_argument("--blocks", type=int, default=12, help="blocks of each side, alternating")
    parser.add_argument("--batches", type=int, default=17, help="steps in a block")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    threat = ThreatModel(eps=EPS)
    size = 64 * options.batches
    loader = DataLoader(TensorDataset(torch.rand(size, 3, 32, 32), torch.randint(10, (size,))), batch_size=64)
    recipe = Recipe(PGD(threat, steps=options.steps), warmup_epochs=0, name="pgd-at")
    torch.manual_seed(0)
    sides = {
        "hand-written": lambda: (HandWritten(options.width, options.steps), []),
        "through the model": lambda: (Plain(options.width), [WassersteinDefense(recipe, through="model")]),
        "through the step": lambda: (Plain(options.width), [WassersteinDefense(recipe, through="step")]),
        "through the step, which logs": lambda: (Logging(options.width), [WassersteinDefense(recipe, through="step")]),
    }
    times = {side: [] for side in sides}
    with scratch(options.output) as folder:
        for _ in range(options.blocks):
            for side, make in sides.items():
                times[side] += block(*make(), loader, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, model = times["hand-written"], times["through the model"]
    result = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "attack_steps": options.steps,
        "pass_ms": round(1e3 * passes(Plain(options.width).to(device), next(iter(loader))), 2),
        "timed_steps_each": len(base),
        "sides": {
            side: {
                "median_ms": round(1e3 * statistics.median(seconds), 2),
                "to_hand_written": round(statistics.median(seconds) / statistics.median(base), 4),
                "to_hand_written_95": ratio_interval(seconds, base),
                "to_model": round(statistics.median(seconds) / statistics.median(model), 4),
                "to_model_95": ratio_interval(seconds, model),
                "means_to_hand_written": round(statistics.mean(seconds) / statistics.mean(base), 4),
            }
            for side, seconds in times.items()
        },
    }
    write_atomically(options.output / f"step_overhead_{device}.json", result, indent=2)
    head = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.items() if key != "sides")
    rows = "\n".join(
        f"| {side} | {it['median_ms']} | {it['to_hand_written']} {it['to_hand_written_95']} | {it['to_model']} {it['to_model_95']} | "
        f"{it['means_to_hand_written']} |"
        for side, it in result["sides"].items()
    )
    text = (
        f"# A `pgd-at` step with the callback against a hand-written loop\n\n`python -m benchmarks.step_overhead`\n\n{head}.\n\n"
        "| | median, ms | ratio to hand-written (95%) | ratio to through the model (95%) | ratio of means |\n|---|---|---|---|---|\n"
        f"{rows}\n"
    )
    write_text(options.output / f"step_overhead_{device}.md", text)
    print(text)


if __name__ == "__main__":
    main()
