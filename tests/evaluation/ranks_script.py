"""Evaluates on each rank's share of the data under torchrun, and writes what each rank got; run by test_ranks.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from support.lightning_modules import DigitsClassifier, digits_loaders
from support.processes import group_ends
from torch.nn.parallel import DistributedDataParallel

from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import FMN, PGD

THREAT = ThreatModel(eps=0.1)
SHARES = {"unequal": ([0, 1, 2], [3]), "none": ([0, 1, 2, 3], [])}


class Recording(PGD):
    """Keeps the perturbations that it made."""

    made: list = []  # noqa: RUF012

    def perturb(self, problem):
        adversarial = super().perturb(problem)
        self.made.append((adversarial - problem.data).detach())
        return adversarial


def measured(model, batches, resume=None):
    """With an attack without noise, so that it does not matter which rank has which batch."""
    attacks = {"fgsm": "fgsm", "pgd": PGD(THREAT, steps=3, random_start=False)}
    return evaluate(model, batches, THREAT, attacks, epsilons=[0.05], progress=False, resume=resume)


def by_distance(model, batches):
    options = {"distances": FMN(THREAT, steps=5), "examples": 3}
    result = evaluate(model, batches, THREAT, ["fgsm"], **options, progress=False)
    examples = [(*each[:5], each.inputs) for each in (*result.examples.least, *result.examples.most)]
    return result.values, tuple(result.curve), result.samples["distance"], examples, result.plan, result.seconds


def error_of(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, batches = dist.get_rank(), list(digits_loaders()[1])

    def model():
        module = DigitsClassifier(batch_norm=True)
        module.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
        return module.net

    # Its forward pass exchanges the buffers of BatchNorm: ranks that run it a different number of times would wait for each other.
    wrapped = DistributedDataParallel(model())
    found = {}
    for share, indices in SHARES.items():
        result = measured(wrapped, [batches[index] for index in indices[rank]])
        found[share] = {"values": result.values, "samples": result.samples, "curve": tuple(result.curve)}
        found[share]["distances"] = by_distance(wrapped, [batches[index] for index in indices[rank]])
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    set_up = fabric.setup(model())
    found["wrapped"] = any(isinstance(each, DistributedDataParallel) for each in set_up.modules())
    found["fabric"] = measured(set_up, [batches[index] for index in SHARES["unequal"][rank]]).values
    evaluate(model(), batches[:1], THREAT, [Recording(THREAT, steps=1)], features=None)
    found["perturbations"] = Recording.made[0]
    inputs, labels = batches[0]
    found["failure"] = error_of(lambda: measured(model(), [(inputs, labels + 5 * rank)]))
    mine, work = [batches[index] for index in SHARES["unequal"][rank]], f"{folder}/work.pt"
    bad = (inputs, labels + 5) if rank == 0 else (inputs, labels)
    found["interrupted"] = error_of(lambda: measured(wrapped, [*mine[:2], bad], work))
    result = measured(wrapped, mine if rank == 0 else [*mine, (inputs, labels)], work)
    found["resumed"] = {"values": result.values, "samples": result.samples}
    result = measured(wrapped, mine if rank == 0 else [*mine, (inputs, labels)])
    found["uninterrupted"] = {"values": result.values, "samples": result.samples}
    found["files"] = sorted(path.name for path in Path(folder).glob("work*"))
    found["empty"] = error_of(lambda: measured(model(), []))
    torch.save(found, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    with group_ends():
        main(sys.argv[1])
