"""What every recipe is trained and judged by: the same for all, and part of each run's identity."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lightning_wdefense import ThreatModel
from lightning_wdefense.attacks import PGD, Attack, get_attack

CLEAN = "clean"
STAGES = {"pgd": CLEAN, "apgd-ce": CLEAN, "apgd-t": "apgd-ce", "fab-t": "apgd-t", "square": "fab-t"}
"""The attacks on the test images, and after which one each takes up what is left. After ``square`` that is AutoAttack."""
ALWAYS = ("pgd", "apgd-ce", "apgd-t")
AUTOATTACK = ("fab-t", "square")


@dataclass(frozen=True)
class Protocol:
    """Data, training and attacks of one benchmark.

    Args:
        dataset: name of the data.
        train: number of training images.
        validation: images, held out of the training set, on which the epoch is chosen.
        test: images that are attacked at the end.
        eps: L-infinity radius of training and of every attack.
        epochs: of training; those after the recipe's warm-up can be chosen.
        batch_size: of training.
        optimizer: ``"adam"`` or ``"sgd"`` (momentum 0.9, weight decay 5e-4).
        schedule: ``"constant"`` or ``"one-cycle"``.
        lr: learning rate, with one-cycle its peak.
        warmup_epochs: over which eps grows; ``None`` leaves it to the recipe.
        ema_decay: of averaged weights (``+avg``).
        attack_precision: of the attack's passes in training, ``"32"`` or ``"bf16"``; every attack that judges runs in float32.
        validation_steps: of the PGD that chooses the epoch.
        pgd_steps: of PGD on the test images.
        pgd_restarts: of the same.
        attack_steps: of APGD-CE, APGD-T and FAB-T; the standard is 100.
        queries: of Square; the standard is 5000.
        device: ``"cpu"`` or ``"cuda"``.
        data: fingerprint of the images.
    """

    dataset: str
    train: int
    validation: int
    test: int
    eps: float
    epochs: int
    batch_size: int
    optimizer: str = "adam"
    schedule: str = "constant"
    lr: float = 1e-3
    warmup_epochs: float | None = None
    ema_decay: float = 0.99
    attack_precision: str = "32"
    validation_steps: int = 20
    pgd_steps: int = 50
    pgd_restarts: int = 3
    attack_steps: int = 100
    queries: int = 5000
    device: str = "cpu"
    data: str = ""

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(norm="linf", eps=self.eps)

    def attack(self, stage: str) -> Attack:
        """The attack of a stage on the test images; of the first two parts of AutoAttack also in tuning."""
        if stage == "pgd":
            return PGD(self.threat, steps=self.pgd_steps, restarts=self.pgd_restarts)
        length = {"queries": self.queries} if stage == "square" else {"steps": self.attack_steps}
        return get_attack(stage, self.threat, **length)

    def first_epoch(self, warmup_epochs: float) -> int:
        """The first epoch, counted from 0, that trains at the full radius from its first step on, or else the last one."""
        return min(-int(-warmup_epochs // 1), self.epochs - 1)

    def __str__(self) -> str:
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asdict(self).items() if value is not None)


PROTOCOLS = {
    "digits": Protocol("digits", train=1097, validation=300, test=400, eps=0.2, epochs=20, batch_size=64, lr=2e-3, ema_decay=0.95),
    # Adam at its default rate: what a pipeline that was written for clean accuracy brings. Adversarial training alone does best with
    # --schedule one-cycle --lr 0.01 (of 3e-3, 6e-3, 1e-2 and 2e-2, by APGD on validation images): the control.
    "mnist": Protocol(
        "mnist", train=20_000, validation=1000, test=1000, eps=0.3, epochs=6, batch_size=128,
        pgd_restarts=1, attack_precision="bf16",
    ),
    "cifar10": Protocol(
        "cifar10", train=49_000, validation=1000, test=1000, eps=8 / 255, epochs=30, batch_size=128,
        optimizer="sgd", schedule="one-cycle", lr=0.2, ema_decay=0.995, pgd_restarts=1, attack_precision="bf16",
    ),
}  # fmt: skip
