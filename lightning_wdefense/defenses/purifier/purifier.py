"""A generator that maps attacked inputs back to clean ones, trained with a critic in front of a classifier."""

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
from lightning_wdefense._strategy import check_strategy
from lightning_wdefense.attacks import Attack, ThreatModel, get_attack, worst_case
from lightning_wdefense.attacks.registry import evaluation_attacks
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.critic import CriticDiscrepancy, OnlineCritic
from lightning_wdefense.defenses.purifier.classifier import PurifiedClassifier
from lightning_wdefense.defenses.purifier.generators import BoundedGenerator, generator_for
from lightning_wdefense.defenses.recipe import mean_cross_entropy
from lightning_wdefense.modules.batches import BatchReader, Key
from lightning_wdefense.modules.outputs import float32_or_better
from lightning_wdefense.modules.state.isolation import isolated

_CHECKPOINT_KEY = "wasserstein_purifier"


class WassersteinPurifier(LightningModule):
    r"""Trains a generator that maps attacked inputs back to the clean distribution, in front of a classifier that stays as it is.

    The generator ``G`` minimises, over the attacked inputs ``x'`` of clean ones ``x`` of class ``y``,

        ``critic_weight * gap(x, G(x')) + reconstruction_weight * mean |x - G(x')| + task_weight * CE(classifier(G(x')), y)``,

    where the gap is what a Lipschitz critic, which trains beside it, sees of ``W_1`` between the clean and the purified inputs of each
    class; it never exceeds the paired distance that stands next to it. Both are in data units (Euclidean lengths of a whole sample).

    **A purifier is worth what is left when the attack goes through it**, and nothing else is measured here: ``val/robust_acc`` and
    ``val/clean_acc`` (``test/...``) are of the purifier and the classifier as one model. By default the attack in training goes through as
    well. ``through=False`` is the way of the papers (APE-GAN, Defense-GAN): the attack sees the classifier alone. That looks excellent
    as long as nobody attacks the purifier, and then leaves next to nothing; it is here to show that.

    Also logged are ``train/loss``, ``train/task_loss``, ``train/reconstruction``, and of the critic ``train/critic_gap``,
    ``train/critic_distance``, ``train/critic_penalty``, ``train/critic_gradient_norm`` and ``train/critic_steps``.

    Fit it like any LightningModule; ``purifier.purified`` is then the defended model. It can be watched in training by other callbacks,
    ``RobustnessMonitor(threat, ["autoattack"], model="purified", name="auto")``. Override ``configure_optimizers`` for another optimiser of
    ``self.purified.purifier``'s parameters. The classifier is run in eval mode and is never changed (Lightning may warn at the start that it
    is in eval mode: so it should be). The critic has an optimiser of its own, lives in the checkpoint and is the same on all ranks.

    Args:
        classifier: returns logits of inputs in model units; it should be trained already.
        threat: what the attacker may do.
        attack: of the training, by name or made for the same threat.
        through: whether that attack goes through the purifier.
        generator: module from inputs ``(N, ...)`` to inputs of the same shape, in model units; ``None`` for a :class:`ResidualGenerator`
            that fits the classifier's first layer. Its results are clamped to the threat's bounds.
        critic: what kind of critic.
        critic_weight: of the critic's gap; 0 for no critic.
        reconstruction_weight: of the paired distance.
        task_weight: of the classifier's cross-entropy.
        evaluation: the attack through the purifier in validation and test, which is PGD for watching training; no claim of robustness
            should rest on less than ``"autoattack"``.
        lr: learning rate of Adam.
        inputs: position, key or attribute of the inputs in a batch; by default found by convention.
        labels: the same for the labels.
        seed: seeds the attacks' noise, which depends only on it, the epoch, the batch and the rank.

    Raises:
        ValueError: for an unknown attack, one made for another threat model, weights that are negative, not finite or all 0, or a classifier
            that does not tell the shape of its inputs; in training, for inputs or labels that do not fit, a generator that changes the shape,
            or, with a critic, a batch of fewer than two samples.
        TypeError: in training, for a classifier whose outputs are no logits.
        FloatingPointError: in training, if a part of the loss is NaN or infinite; says which.
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
            raise ValueError(f"The attack was made for {self.attack.threat}, but threat={threat}: use the same one.")
        self.evaluation = evaluation_attacks([evaluation], threat)
        generator = generator_for(classifier) if generator is None else generator
        self.purified = PurifiedClassifier(BoundedGenerator(generator, threat), classifier)
        self._critic = OnlineCritic(critic or CriticDiscrepancy())
        self._batches = BatchReader(inputs, labels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Purified inputs ``(N, ...)``, in model units."""
        return self.purified.purify(inputs)

    def setup(self, stage: str) -> None:
        """Keep the classifier, which is not trained, out of what DDP synchronises; let the critic move to where the data will be."""
        check_strategy(self.trainer, type(self).__name__)
        classifier = self.purified.classifier
        names = [name for name, _ in (*classifier.named_parameters(), *classifier.named_buffers())]
        self._ddp_params_and_buffers_to_ignore = [f"purified.classifier.{name}" for name in names]
        self._critic.load_state_dict(self._critic.state_dict())

    def configure_optimizers(self) -> Any:
        """Adam on the generator."""
        return torch.optim.Adam(self.purified.purifier.parameters(), lr=self.lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the generator's gradients, which the trainer asks for before it begins; the classifier's are none of its business."""
        self.purified.purifier.zero_grad(set_to_none)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Attack the batch, let the critic learn from it, and say how far the purified inputs are from the clean ones."""
        inputs, labels = self._batches.read(batch)
        noise = seeded_generator(inputs.device, self.seed, self.current_epoch, batch_idx, self.global_rank)
        attacked = self.purified if self.through else self.purified.classifier
        adversarial = self.attack(attacked, inputs, labels, generator=noise)
        purified = self(adversarial)
        with _constant(self.purified.classifier, inputs.device):
            outputs = self.purified.classifier(purified.clone())  # it may work in place
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
        """Attack the purifier and the classifier as one."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Attack the purifier and the classifier as one."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the critic. An override must call ``super()``."""
        checkpoint[_CHECKPOINT_KEY] = self._critic.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the critic. An override must call ``super()``."""
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
    """Inside, the module is run in eval mode, without a trace, and is differentiated with respect to its inputs alone."""
    with isolated(module, device), frozen(module):
        yield


def _check_weights(weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name}_weight must be finite and not negative, got {weight}.")
    if not any(weights.values()):
        raise ValueError(
            "critic_weight, reconstruction_weight and task_weight are all 0: there is nothing to train for."
        )


def _check_finite(parts: dict[str, Tensor]) -> None:
    values = torch.stack([part.detach().float() for part in parts.values()])
    if not bool(values.isfinite().all()):
        found = ", ".join(f"{name} = {value:.4g}" for name, value in zip(parts, values.tolist(), strict=True))
        raise FloatingPointError(
            f"The purifier's loss is not finite ({found}): lower lr, clip gradients, or look at the generator and the classifier."
        )
