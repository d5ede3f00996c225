"""A training step of PreAct ResNet-18 on images of CIFAR-10's size.

PGD with ten steps, then the update, in Lightning's Trainer. ``bare`` is the same number of passes written by hand into the step, to
which the others are compared. The share of transport is the time of the discrepancy alone, with its gradients, in that of the step.
"""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.book import Row
from benchmarks.gpu.classifier import Classifier, Clock, OnCard, network, trainer
from benchmarks.gpu.context import Context, timed
from benchmarks.shared.pgd import hand_written_pgd
from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD, Execution
from lightning_wdefense.defenses.discrepancies import get_discrepancy

EPS = 8 / 255
STEPS = 10
WARM, BLOCK, BLOCKS = 5, 4, 4
"""Steps before the clock starts, steps between two looks at it, and how many such blocks there are."""


class Side(NamedTuple):
    """A way to train: a recipe, or bare passes.

    Attributes:
        recipe: its name; ``None`` for bare passes.
        batch: images a step.
        precision: of the Trainer.
        execution: of the attack.
    """

    recipe: str | None
    batch: int
    precision: str = "bf16-mixed"
    execution: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join(
            (self.recipe or "bare", f"batch {self.batch}", self.precision.removesuffix("-mixed"), *self.execution)
        )

    @property
    def bare(self) -> Side:
        return Side(None, self.batch, self.precision)


SIDES = [
    *(
        Side(recipe, batch, "bf16-mixed", execution)
        for batch in (128, 512)
        for recipe, execution in (
            (None, ()), ("pgd-at", ()), ("pgd-at", ("graph",)), ("class-transport", ()), ("class-transport", ("graph",)),
            ("sat-features", ()), ("critic", ()),
        )
    ),
    Side(None, 128, "32-true"), Side("pgd-at", 128, "32-true"), Side("pgd-at", 128, "32-true", ("graph",)),
    Side("pgd-at", 128, "bf16-mixed", ("compile",)),
]  # fmt: skip
TOYS = [
    Side(None, 8),
    Side("pgd-at", 8),
    Side("pgd-at", 8, "bf16-mixed", ("graph",)),
    Side("class-transport", 8),
    Side("critic", 8),
]


class Bare(Classifier):
    """The passes of adversarial training by PGD, and nothing else but the sign and the clamps."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(hand_written_pgd(self, x, y, EPS, STEPS)), y)


def step(side: Side, context: Context) -> Row:
    """Milliseconds of a step, and beside those of the bare passes."""
    torch.manual_seed(0)
    steps = WARM + BLOCK * BLOCKS + 1
    x = torch.rand(side.batch * 4, 3, 32, 32, device=context.device)
    y = torch.randint(10, (len(x),), device=context.device)
    net = network(context.rehearse)
    clock, callbacks = Clock(WARM, BLOCK), []
    if side.recipe is None:
        module: Classifier = Bare(net)
    else:
        module = Classifier(net)
        execution = Execution(**dict.fromkeys(side.execution, True), channels_last=True)
        recipe = Recipe.named(side.recipe, ThreatModel(eps=EPS), warmup_epochs=0, execution=execution)
        callbacks = [WassersteinDefense(recipe)]
    fit = trainer(context.device, side.precision, [*callbacks, clock], max_steps=steps, max_epochs=-1)
    # One long epoch, so that what ends an epoch is not timed.
    fit.fit(module, Repeated(OnCard(x, y, side.batch, 0), steps))
    each = [1e3 * seconds for seconds in clock.seconds]
    taken = statistics.median(each)
    found: Row = {"ms": taken, "least to most": [min(each), max(each)]}
    bare = context.book.stage(context.stage).get("rows", {}).get(side.bare.name, {}).get("ms")
    if side.recipe is not None and bare:
        found["to bare"] = taken / bare
    alone = transport_ms(side, context)
    return found | ({} if alone is None else {"transport alone, ms": alone, "its share": alone / taken})


class Repeated:
    """The batches of a loader again and again, so many in all."""

    def __init__(self, loader: OnCard, count: int) -> None:
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        batches = list(self.loader)
        return (batches[i % len(batches)] for i in range(self.count))


def transport_ms(side: Side, context: Context) -> float | None:
    """Milliseconds of a recipe's transport of features, with its gradients; ``None`` if it has none."""
    if side.recipe not in ("class-transport", "sat-features"):
        return None
    discrepancy = get_discrepancy("class-transport" if side.recipe == "class-transport" else "sinkhorn")
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (side.batch,), generator=rng)
    centres = torch.randn(10, 512, generator=rng)
    clean, attacked = (
        (centres[labels] + torch.randn(side.batch, 512, generator=rng)).relu().to(context.device).requires_grad_()
        for _ in range(2)
    )
    labels = labels.to(context.device)

    def call() -> None:
        torch.autograd.grad(discrepancy(clean, attacked, labels), (clean, attacked))

    return float(timed(call, context, most=1.0)["ms"])


def attack(name: str, batch: int, context: Context) -> Row:
    """PGD alone, in float32: ours as it is and as a graph, and torchattacks'."""
    model = network(context.rehearse).to(context.device).eval()
    x = torch.rand(batch, 3, 32, 32, device=context.device)
    y = torch.randint(10, (batch,), device=context.device)
    threat = ThreatModel(eps=EPS)
    if name == "torchattacks":
        import torchattacks

        peer = torchattacks.PGD(model, eps=EPS, alpha=2.5 * EPS / STEPS, steps=STEPS, random_start=True)
        return timed(lambda: peer(x, y), context)
    execution = Execution(**({"graph": True} if name == "ours, graph" else {}))
    ours = PGD(threat, steps=STEPS)
    return timed(lambda: ours(model, x, y, execution=execution), context)


def run(context: Context) -> None:
    last = [side for side in SIDES if "compile" in side.execution]
    for side in TOYS if context.rehearse else [side for side in SIDES if side not in last]:
        context.measure(side.name, lambda side=side: step(side, context), seconds=3)
    peers = ["torchattacks"] if importlib.util.find_spec("torchattacks") else []
    for batch in (4,) if context.rehearse else (128, 512):
        for name in ("ours", "ours, graph", *peers):
            label = f"PGD alone, {name}, batch {batch}"
            context.measure(label, lambda name=name, batch=batch: attack(name, batch, context), seconds=2)
    for side in [] if context.rehearse else last:
        context.measure(side.name, lambda side=side: step(side, context), seconds=20)
