"""Trains recipes in a loop of one's own on any number of ranks, and writes losses, gradients and what was learned; run by test_ranks.py."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits
from support.processes import group_ends
from torch.nn.parallel import DistributedDataParallel

from lightning_wdefense import Recipe, ThreatModel
from lightning_wdefense._ranks import Ranks, rows_of
from lightning_wdefense.attacks import SharedBudgetPGD
from lightning_wdefense.defenses import SampleReweighting
from lightning_wdefense.defenses.step import StepSettings

THREAT = ThreatModel(eps=0.2)
STEPS = 3
SPLITS = {"even": {1: [24], 2: [12, 12], 3: [8, 8, 8]}, "uneven": {1: [24], 2: [17, 7], 3: [11, 13, 0]}}


def recipe_of(case):
    name, *changes = case.split("+")
    reweighting = SampleReweighting(radius=0.2) if "reweighting" in changes else None
    awp = 0.01 if "awp" in changes else 0.0
    recipe = Recipe.named(name, THREAT, gather="gather" in changes, awp=awp, reweighting=reweighting)
    # Noise differs by rank, so that it cannot be that of one process.
    quiet = {} if name == "wrm" else {"random_start": False, "loss": "ce"}
    return replace(recipe, attack=replace(recipe.attack, **quiet))


def train(case, ranks):
    """Losses, gradients and learned state of a few steps, and the discrepancy alone."""
    recipe = recipe_of(case)
    torch.manual_seed(0)
    model = DigitsClassifier()
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    defense = recipe.bind(wrapped, warmup_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    images, labels = digits()
    own = rows_of(ranks.rank, SPLITS["uneven" if "uneven" in case else "even"][ranks.size])
    found = []
    for step in range(STEPS):
        batch = slice(24 * step, 24 * step + 24)
        optimizer.zero_grad()
        loss = torch.zeros(())
        parts = [rows_of(half, SPLITS["even"][2]) for half in range(2)] if "halves" in case else [own]
        batches = [batch, slice(batch.start + 100, batch.stop + 100)] if "accumulate" in case else [batch]
        for i, (which, part) in enumerate((which, part) for which in batches for part in parts):
            accumulates = i + 1 < len(batches) and dist.is_initialized()
            with wrapped.no_sync() if accumulates else contextlib.nullcontext():
                output = defense(images[which][part], labels[which][part], step=step * len(batches) + i // len(parts))
                (output.loss / len(parts) / len(batches)).backward()
            loss += output.logs["loss"] / len(parts) / len(batches)
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append({"loss": ranks.mean(loss), "gradient": gradient.clone()})
        optimizer.step()
    return {"steps": found, "learned": plain(defense.state_dict())}


def discrepancies(recipe, ranks, split):
    """The discrepancy and its gradient in this rank's samples, of clouds that are split over the ranks: no task loss beside it."""
    images, labels = digits()
    own = rows_of(ranks.rank, SPLITS[split][ranks.size])
    torch.manual_seed(0)
    defense = recipe.bind(DigitsClassifier())
    clean = images[:24].flatten(1)[own].clone().requires_grad_()
    moved = images[24:48].flatten(1)[own].clone().requires_grad_()
    from lightning_wdefense.defenses.branch import Branch

    value = defense._discrepancy_of(
        defense._compared(Branch(None, clean), Branch(None, moved), ranks), labels[:24][own]
    )
    value.backward()
    # The mean over ranks of what each passes back is the gradient; so each passes back as many times its share.
    return {"value": value.detach(), "clean": clean.grad / ranks.size, "moved": moved.grad / ranks.size}


def shared(what, ranks):
    """Rows of this rank, of what the samples of all ranks share, and what it adds to this rank's loss."""
    images, labels = digits()
    own = rows_of(ranks.rank, SPLITS["uneven"][ranks.size])
    torch.manual_seed(0)
    model = DigitsClassifier()
    if what == "reweighting":
        losses = torch.rand(24, generator=torch.Generator().manual_seed(0))[own]
        reweighting = SampleReweighting(radius=0.2, loss=lambda outputs, labels: outputs)
        added, _ = reweighting.added(losses, None, ranks)
        return {"rows": losses, "value": float(added)}
    attack = SharedBudgetPGD(THREAT, p=1 if what == "order-1" else 2, random_start=False)
    defense = Recipe(attack, warmup_epochs=0).bind(model)
    found = defense.adversarial(defense.passes(images[:24][own], labels[:24][own]), StepSettings(ranks=ranks))
    lengths = THREAT.ball.length(found - images[:24][own]) if len(found) else torch.zeros(0)
    return {"rows": found, "value": float(lengths.sum()) * ranks.size}


def main(folder, world, *cases):
    if int(world) > 1:
        dist.init_process_group("gloo")
    ranks = Ranks.current()
    results = {}
    for case in cases:
        if case.startswith("only:"):
            name, split = case.removeprefix("only:").split("+")
            results[case] = discrepancies(recipe_of(f"{name}+gather"), ranks, split)
        elif case.startswith("shared:"):
            results[case] = shared(case.removeprefix("shared:"), ranks)
        else:
            results[case] = train(case, ranks)
    torch.save(results, f"{folder}/{ranks.rank}.pt")


if __name__ == "__main__":
    if int(sys.argv[2]) == 1:
        main(*sys.argv[1:])
    else:
        with group_ends():
            main(*sys.argv[1:])
