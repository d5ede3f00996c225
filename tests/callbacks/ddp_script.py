"""Trains recipes and runs monitors under two-process DDP, and writes what each rank ended with; run by test_ddp.py."""

from __future__ import annotations

import sys
from dataclasses import replace

import support.lightning_alias  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from callbacks import test_detection_monitor, test_monitor_environments
from lightning import seed_everything
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer, trained_classifier
from support.processes import group_ends
from torchmetrics import Accuracy

from lightning_wdefense import Recipe, RobustnessMonitor, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.attacks import PGD
from lightning_wdefense.defenses import ResidualGenerator, WassersteinPurifier

THREAT = ThreatModel(eps=0.2)


class Recording(PGD):
    """Keeps the perturbations it made."""

    made: list = []  # noqa: RUF012

    def perturb(self, problem):
        adversarial = super().perturb(problem)
        self.made.append((adversarial - problem.data).detach())
        return adversarial


class Defended(WassersteinDefenseMixin, DigitsClassifier):
    """Makes the call itself."""

    def __init__(self, recipe):
        super().__init__(batch_norm=True)
        self.recipe = recipe

    def configure_defense(self):
        return self.recipe

    def training_step(self, batch, batch_idx):
        return self.defend(*batch).loss


class Normalising(DigitsClassifier):
    """Normalises in its steps, and logs a metric's object and a mean of its own."""

    def __init__(self, batch_norm):
        super().__init__(batch_norm=batch_norm)
        self.accuracy = Accuracy("multiclass", num_classes=10)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net((batch[0] - 0.3) / 0.4), batch[1])

    def validation_step(self, batch, batch_idx):
        logits = self.net((batch[0] - 0.3) / 0.4)
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy)
        self.log("right", (logits.argmax(1) == batch[1]).float().mean(), sync_dist=True)


def monitored():
    """A validation of each rank's half."""
    seed_everything(0, verbose=False)
    attack = PGD(THREAT, steps=3, random_start=False)
    return validated(Normalising(True), RobustnessMonitor(THREAT, [attack]))


def validated(module, monitor):
    """What is logged on rank 0 and 1 with this monitor."""
    trainer = quiet_trainer(strategy="ddp", devices=2, callbacks=[monitor])
    trainer.validate(module, digits_loaders()[1], verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def purifier():
    """Twenty steps of a purifier before a classifier whose parameters all require gradients."""
    seed_everything(0, verbose=False)
    module = WassersteinPurifier(
        DigitsClassifier(batch_norm=True), THREAT, PGD(THREAT, steps=2), generator=ResidualGenerator(64), lr=0.01
    )
    trainer = quiet_trainer(strategy="ddp", devices=2, max_steps=20, max_epochs=-1)
    trainer.fit(module, digits_loaders(shuffle=False)[0])
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    return {"weights": plain(module.state_dict()), "learned": plain(checkpoint)}


def main(folder, *recipes):
    results = {}
    for case in recipes:
        name = case.removeprefix("mixin:").removeprefix("step:")
        seed_everything(0, verbose=False)
        recipe = Recipe.named(name.removesuffix("+awp"), THREAT, awp=0.01 * name.endswith("+awp"), warmup_epochs=0)
        if case == "pgd-at":
            recipe = replace(recipe, attack=Recording(THREAT, steps=2))
        by_mixin = case.startswith("mixin:")
        defense = WassersteinDefense(recipe, through="step" if case.startswith("step:") else "auto")
        module = Defended(recipe) if by_mixin else (Normalising if case.startswith("step:") else DigitsClassifier)(True)
        trainer = quiet_trainer(
            strategy="ddp",
            devices=2,
            limit_train_batches=3,
            callbacks=[] if by_mixin else [defense],
            log_every_n_steps=1,
            max_epochs=7 if name == "critic" else 1,
        )
        trainer.fit(module, digits_loaders(shuffle=False)[0])
        parameters = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        learned = module.defense if by_mixin else defense
        results[case] = {"weights": parameters, "learned": plain(learned.state_dict())}
    results["purifier"] = purifier()
    results["monitor"] = monitored()
    results["robustness"] = validated(trained_classifier(), test_monitor_environments.watch())
    results["detection"] = validated(trained_classifier(), test_detection_monitor.watch())
    results["perturbations"] = torch.stack(Recording.made)
    torch.save(results, f"{folder}/{trainer.global_rank}.pt")


if __name__ == "__main__":
    with group_ends():
        main(*sys.argv[1:])
