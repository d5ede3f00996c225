"""Trains recipes under DDP and under FSDP2 on two ranks, and measures them; run by test_fsdp.py."""

from __future__ import annotations

import sys
import warnings

import torch
from lightning import seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
from support.processes import group_ends
from torch import nn

from lightning_wdefense import AdversarialExampleLogger, Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import FMN, PGD, AutoAttack, TorchAttack

THREAT = ThreatModel(eps=0.2)
SMALL = ThreatModel(eps=0.05)
SMALL_L2 = ThreatModel(norm="l2", eps=0.3)
EARLY = PGD(SMALL, steps=3, restarts=3, early_exit=True)
"""Of which ranks would run different numbers of passes."""

REFUSED = {
    "awp": lambda: WassersteinDefense(Recipe.named("pgd-at", THREAT, awp=0.01)),
    "torchattacks": lambda: RobustnessMonitor(THREAT, [TorchAttack("PGD", THREAT)], max_batches=1),
    "pictures": lambda: AdversarialExampleLogger(THREAT),
}


class Classifier(DigitsClassifier):
    """Shards its layers where the strategy asks for it; every layer keeps its parameters on both ranks otherwise."""

    def configure_model(self):
        if self.device_mesh is None or self.is_sharded:
            return
        from torch.distributed.fsdp import fully_shard  # torch 2.6 and later

        mesh = self.device_mesh["data_parallel"]
        for layer in (*(each for each in self.net if list(each.parameters())), self.net):
            fully_shard(layer, mesh=mesh)

    @property
    def is_sharded(self):
        return any(hasattr(parameter, "full_tensor") for parameter in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


class Accuracy(Classifier):
    """Computes its accuracy in the step, on normalised inputs, so that an attack goes through it."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net((batch[0] - 0.3) / 0.4), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net((batch[0] - 0.3) / 0.4)
        self.log("loss", nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)
        self.log("right", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)


def whole(module):
    """All parameters, gathered."""
    found = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in module.parameters()]
    return torch.cat([each.detach().flatten() for each in found])


def strategy(kind):
    return "ddp" if kind == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def train(case, kind):
    """Weights, learned state and monitored values of a short training."""
    name, *how = case.split("+")
    seed_everything(0, verbose=False)
    through_step = "step" in how
    module = (Accuracy if through_step else Classifier)()
    recipe = Recipe.named(name, THREAT, gather="gather" in how, awp=0.01 * ("awp" in how), warmup_epochs=1)
    defense = WassersteinDefense(recipe)
    attacks = [AutoAttack(SMALL_L2, steps=3, queries=6, targets=2)] if "autoattack" in how else [EARLY]
    distances = FMN(SMALL, steps=3, tightening=2) if "distances" in how else None
    monitor = RobustnessMonitor(attacks[0].threat, attacks, epsilons=[0.02], distances=distances)
    trainer = quiet_trainer(
        strategy=strategy(kind),
        devices=2,
        limit_train_batches=4,
        max_epochs=1,
        callbacks=[defense, monitor],
        log_every_n_steps=1,
    )
    # In batches of two, one rank often has no sample left where the other has.
    trainer.fit(module, digits_loaders(shuffle=False)[0], digits_loaders(batch_size=2, val_size=48)[1])
    assert module.is_sharded == (kind == "fsdp2")
    values = {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(("val/", "robust"))
    }
    return {"weights": whole(module), "values": values}, trainer


def refusal(case):
    """The error of a callback or recipe that cannot work under FSDP2."""
    seed_everything(0, verbose=False)
    callback = REFUSED[case]()
    trainer = quiet_trainer(strategy=strategy("fsdp2"), devices=2, max_epochs=1, callbacks=[callback])
    try:
        trainer.fit(Classifier(), *digits_loaders())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder, *cases):
    results = {}
    for case in cases:
        if case.startswith("refused:"):
            results[case] = refusal(case.removeprefix("refused:"))
            continue
        results[case] = {}
        for kind in ("ddp", "fsdp2"):
            results[case][kind], trainer = train(case, kind)
    torch.save(results, f"{folder}/{trainer.global_rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with group_ends():
        main(*sys.argv[1:])
