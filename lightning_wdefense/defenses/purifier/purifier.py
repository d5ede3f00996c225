"""Trains a generator, in front of a classifier, to map attacked inputs back to the clean distribution."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import LightningModule
from lightning_wdefense._frozen import frozen
from lightning_wdefense._seeding import seeded_generator
from lightning_wdefense.attacks import Attack, ThreatModel, get_attack, worst_case
from lightning_wdefense.attacks.registry import evaluation_attacks
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.critic import CriticDiscrepancy, OnlineCritic
from lightning_wdefense.defenses.purifier.classifier import PurifiedClassifier
from lightning_wdefense.defenses.purifier.generators import BoundedGenerator, generator_for
from lightning_wdefense.defenses.terms import mean_cross_entropy
from lightning_wdefense.modules.batches import BatchReader, Key
from lightning_wdefense.modules.outputs import float32_or_better
from lightning_wdefense.modules.parallel import check_strategy
from lightning_wdefense.modules.state.isolation import isolated

_CHECKPOINT_KEY = "wasserstein_purifier"


class WassersteinPurifier(LightningModule):
    r"""Trains a generator that maps attacked inputs back to the clean distribution, in front of a frozen classifier.

    The generator ``G`` minimises, over clean inputs ``x`` of class ``y`` and their adversarial inputs ``x'``,

        ``critic_weight * gap(x, G(x')) + reconstruction_weight * mean |x - G(x')| + task_weight * CE(classifier(G(x')), y)``,

    where the gap estimates ``W_1`` between the clean and the purified inputs of each class, by a Lipschitz critic that is trained
    with the generator. The gap never exceeds the paired distance ``mean |x - G(x')|``. Both are in data units (Euclidean norm of a
    whole sample).

    **A purifier must be evaluated by attacks that go through it**, and this module measures nothing else: ``val/robust_acc`` and
    ``val/clean_acc`` (``test/...``) belong to the purifier and the classifier as one model. By default the attack in training goes
    through both as well. With ``through=False`` the attack in training sees the classifier alone, as in APE-GAN and Defense-GAN. Such
    a purifier has a high accuracy under attacks on the classifier alone, and almost none under attacks through the purifier. The
    option exists for this comparison.

    Also logged: ``train/loss``, ``train/task_loss``, ``train/reconstruction``, and for the critic ``train/critic_gap``,
    ``train/critic_distance``, ``train/critic_penalty``, ``train/critic_gradient_norm`` and ``train/critic_steps``.

    Fit it like any LightningModule; ``purifier.purified`` is then the defended model. Other callbacks can monitor it in training:
    ``RobustnessMonitor(threat, ["autoattack"], model="purified", name="auto")``. To use another optimiser, override
    ``configure_optimizers`` and pass it the parameters of ``self.purified.purifier``. The classifier runs in eval mode and never
    changes; Lightning may warn at the start that it is in eval mode, which is intended. The critic has its own optimiser, is saved
    in the checkpoint, and is the same on all ranks.

    Args:
        classifier: a trained classifier from inputs in model units to logits.
        threat: the threat model: norm, perturbation budget eps (data units) and bounds.
        attack: the attack in training, by name or made for the same threat model.
        through: whether the attack in training goes through the purifier.
        generator: module from inputs ``(N, ...)`` to inputs of the same shape, in model units; ``None`` for a
            :class:`ResidualGenerator` that fits the classifier's first layer. Its outputs are clamped to the bounds of the threat.
        critic: settings of the critic.
        critic_weight: weight of the critic's gap; 0 for no critic.
        reconstruction_weight: weight of the paired distance.
        task_weight: weight of the classifier's cross-entropy.
        evaluation: the attack through the purifier in validation and test. PGD is enough to watch training; a claim of robustness
            needs at least ``"autoattack"``.
        lr: learning rate of Adam.
        inputs: position, key or attribute of the inputs in a batch; by default found by convention.
        labels: the same for the labels.
        seed: seed of the attacks' noise. The noise depends only on the seed, the epoch, the batch and the rank.

    Raises:
        ValueError: if the attack is unknown or made for another threat model, a weight is negative or not finite, all weights are 0,
            or the classifier does not determine the shape of its inputs; in training, if inputs or labels do not fit, the generator
            changes the shape, or, with a critic, a batch has fewer than two samples.
        TypeError: in training, if the outputs of the classifier are no logits.
        FloatingPointError: in training, if a part of the loss is NaN or infinite; the message names the part.
        MisconfigurationException: for a strategy that shards the parameters.

    References:
        Shen, Jin, Gao, Zhang, "APE-GAN: adversarial perturbation elimination with GAN", ICASSP 2019.
        Samangouei, Kabkab, Chellappa, "Defense-GAN", ICLR 2018.
        Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018.

    Example:
        >>> classifier = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> purifier = WassersteinPurifier(classifier, ThreatModel(eps=0.1))
        >>> purifier.purified(torch.rand(4, 8)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        classifier: nn.Module,
        threat: ThreatModel,
        attack: str | Attack = "pgd",
        *,
        through: bool = True,
        generator: nn.Module | None = None,
        critic: CriticDiscrepancy | None = None,
        critic_weight: float = 1.0,
        reconstruction_weight: float = 1.0,
        task_weight: float = 1.0,
        evaluation: str | Attack = "pgd",
        lr: float = 1e-3,
        inputs: Key = None,
        labels: Key = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.weights = {"critic": critic_weight, "reconstruction": reconstruction_weight, "task": task_weight}
        _check_weights(self.weights)
        self.threat, self.through, self.lr, self.seed = threat, through, lr, seed
        self.attack = get_attack(attack, threat) if isinstance(attack, str) else attack
        if self.attack.threat != threat:
            raise ValueError(
                f"The attack was made for {self.attack.threat}, but threat={threat}: use the same threat model for both."
            )
        self.evaluation = evaluation_attacks([evaluation], threat)
        generator = generator_for(classifier) if generator is None else generator
        self.purified = PurifiedClassifier(BoundedGenerator(generator, threat), classifier)
        self._critic = OnlineCritic(critic or CriticDiscrepancy())
        self._batches = BatchReader(inputs, labels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Purified inputs ``(N, ...)``, in model units."""
        return self.purified.purify(inputs)

    def setup(self, stage: str) -> None:
        """Exclude the classifier, which is not trained, from DDP, and let the critic move to the device of the data."""
        check_strategy(self.trainer, type(self).__name__)
        classifier = self.purified.classifier
        names = [name for name, _ in (*classifier.named_parameters(), *classifier.named_buffers())]
        self._ddp_params_and_buffers_to_ignore = [f"purified.classifier.{name}" for name in names]
        self._critic.load_state_dict(self._critic.state_dict())

    def configure_optimizers(self) -> Any:
        """Adam on the generator."""
        return torch.optim.Adam(self.purified.purifier.parameters(), lr=self.lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the generator only. The trainer calls this at its start, and the classifier must not change."""
        self.purified.purifier.zero_grad(set_to_none)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Attack the batch, train the critic on it, and return the generator's loss."""
        inputs, labels = self._batches.read(batch)
        noise = seeded_generator(inputs.device, self.seed, self.current_epoch, batch_idx, self.global_rank)
        attacked = self.purified if self.through else self.purified.classifier
        adversarial = self.attack(attacked, inputs, labels, generator=noise)
        purified = self(adversarial)
        with _constant(self.purified.classifier, inputs.device):
            outputs = self.purified.classifier(purified.clone())  # the classifier may work in place
        clean, restored = (self.threat.to_data(float32_or_better(each)) for each in (inputs, purified))
        parts = {
            "task_loss": mean_cross_entropy(outputs, labels),
            "reconstruction": (restored - clean).flatten(1).norm(dim=1).mean(),
        }
        loss = self.weights["task"] * parts["task_loss"] + self.weights["reconstruction"] * parts["reconstruction"]
        _check_finite(parts)
        logs: dict[str, Any] = {}
        if self.weights["critic"] > 0:
            branches = Branch(outputs, clean), Branch(outputs, restored)
            average = functools.partial(self.trainer.strategy.reduce, reduce_op="mean")
            logs = self._critic.update(*branches, labels, generator=noise, average=average, measure=True)
            loss = loss + self.weights["critic"] * self._critic.gap(*branches, labels)
        logs |= {name: part.detach() for name, part in ({"loss": loss} | parts).items()}
        self.log_dict({f"train/{key}": value for key, value in logs.items()}, batch_size=len(inputs))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Attack the purifier and the classifier as one model, and log clean and robust accuracy."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Attack the purifier and the classifier as one model, and log clean and robust accuracy."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the critic. An override must call ``super()``."""
        checkpoint[_CHECKPOINT_KEY] = self._critic.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the critic. An override must call ``super()``."""
        self._critic.load_state_dict(checkpoint.get(_CHECKPOINT_KEY))

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        inputs, labels = self._batches.read(batch)
        place = (self.seed, dataloader_idx, batch_idx, self.global_rank)
        noise = functools.partial(seeded_generator, inputs.device, *place)
        found = worst_case(self.purified, self.evaluation, inputs, labels, everyone=True, generator=noise)
        right = {"clean_acc": found.clean == found.labels, "robust_acc": found.robust}
        logs = {f"{stage}/{key}": value.float().mean() for key, value in right.items()}
        self.log_dict(logs, sync_dist=True, batch_size=len(inputs))


@contextlib.contextmanager
def _constant(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which the module runs in eval mode without side effects, and only its inputs get gradients."""
    with isolated(module, device), frozen(module):
        yield


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}_weight must be finite and not negative, got {weight}.")
    if not any(weights.values()):
        raise ValueError(
            "critic_weight, reconstruction_weight and task_weight are all 0, so there is nothing to train: set one of them above 0."
        )


def _check_finite(parts: dict[str, Tensor]) -> None:
    values = torch.stack([part.detach().float() for part in parts.values()])
    if not bool(values.isfinite().all()):
        found = ", ".join(f"{name} = {value:.4g}" for name, value in zip(parts, values.tolist(), strict=True))
        raise FloatingPointError(
            f"The purifier's loss is not finite ({found}): lower lr, clip gradients, or check the generator and the classifier."
        )
