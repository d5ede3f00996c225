"""Trains recipes under two-process DDP and writes what each rank ended with; run by test_ddp.py."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from lightning import seed_everything
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
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
        name = case.removeprefix("mixin:")
        seed_everything(0, verbose=False)
        recipe = Recipe.named(name.removesuffix("+awp"), THREAT, awp=0.01 * name.endswith("+awp"), warmup_epochs=0)
        if name == "pgd-at":
            recipe = replace(recipe, attack=Recording(THREAT, steps=2))
        defense = WassersteinDefense(recipe)
        module = DigitsClassifier(batch_norm=True) if name == case else Defended(recipe)
        trainer = quiet_trainer(
            strategy="ddp",
            devices=2,
            limit_train_batches=3,
            callbacks=[defense] if name == case else [],
            log_every_n_steps=1,
            max_epochs=7 if name == "critic" else 1,
        )
        trainer.fit(module, digits_loaders(shuffle=False)[0])
        parameters = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        learned = defense if name == case else module.defense
        results[case] = {"weights": parameters, "learned": plain(learned.state_dict())}
    results["purifier"] = purifier()
    results["perturbations"] = torch.stack(Recording.made)
    torch.save(results, f"{folder}/{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
