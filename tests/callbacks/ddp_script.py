"""Trains under two-process DDP and writes what each rank ended with; run by test_ddp.py."""

from __future__ import annotations

import sys

import torch
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer

from lightning_wdefense import ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD


class Recording(PGD):
    """Keeps the perturbations it made."""

    made: list = []  # noqa: RUF012

    def perturb(self, problem):
        adversarial = super().perturb(problem)
        self.made.append((adversarial - problem.data).detach())
        return adversarial


def main(recipe, folder):
    from lightning import seed_everything

    from lightning_wdefense import Recipe

    seed_everything(0, verbose=False)
    threat = ThreatModel(eps=0.2)
    made = Recipe.named(recipe, threat, attack=Recording(threat, steps=2), warmup_epochs=0)
    trainer = quiet_trainer(
        strategy="ddp", devices=2, limit_train_batches=3, callbacks=[WassersteinDefense(made)], log_every_n_steps=1
    )
    module = DigitsClassifier(batch_norm=True)
    trainer.fit(module, digits_loaders(shuffle=False)[0])
    parameters = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    torch.save(
        {"weights": parameters, "perturbations": torch.stack(Recording.made)}, f"{folder}/{trainer.global_rank}.pt"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
