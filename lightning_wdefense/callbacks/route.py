"""Chooses how the attack in training runs the model: by plain forward passes, or through the module's own step."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._ranks import Ranks
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.inspection import (
    ConsumedIteratorError,
    StepInspection,
    inspect_step,
    needs_whole_batches,
)
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.callbacks.target import Target
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.forward_passes import ForwardPasses, StepForwardPasses
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.steps import Step

log = logging.getLogger(__name__)


class Route:
    """How the attack runs one module, chosen at the first batch.

    Plain forward passes are faster: they allow losses per sample, early stopping of samples, and restarts. They are chosen if an
    inspection of the step shows that they are the same computation. That is the case if

    - the model ran once, on the batch's own tensor and nothing else, and
    - its outputs are logits of the label classes (the loss decreases when the logit of the label's class grows), or the attack has
      a loss function of the user's own.

    Otherwise the attack goes through the step.

    Args:
        target: what is attacked.
        threat: the threat model.
    """

    def __init__(self, target: Target, threat: ThreatModel) -> None:
        self._target, self._threat = target, threat
        self.inspection: StepInspection | None = None
        self.plain = target.through == "model"
        self._whole = False

    def examine(self, step: Step, batch: Any, model: nn.Module | None, attack: Attack) -> StepInspection | None:
        """Inspect a step and choose the route; ``None`` if the step returns no loss.

        Raises:
            ValueError: if the step returns something without a loss, or a loss that does not depend on the attacked values.
        """
        target = self._target
        site, labels = target.site(step, batch, self._threat), target.labels(batch)
        try:
            inspection = inspect_step(step, site, labels, model, target.pick)
        except ConsumedIteratorError:
            raise
        except Exception as error:
            if not target.may_be_plain or model is None:
                raise
            warnings.warn(
                f"The inspection of {step.name} failed ({type(error).__name__}: {error}), so the attack uses plain forward passes.",
                stacklevel=2,
            )
            self.plain = True
            return StepInspection()
        if inspection.loss is None:
            return None
        self.plain = (
            target.may_be_plain
            and inspection.plain
            and (inspection.outputs == "model" or callable(getattr(attack, "loss", None)))
        )
        if not self.plain and not inspection.differentiable:
            raise ValueError(self._no_gradient(step, site))
        if self.plain and model is not None:
            self._whole = needs_whole_batches(model, site.values, target.pick)
        if not self.plain and target.may_be_plain:
            log_route(step, step.name, inspection)
        self.inspection = inspection
        return inspection

    def passes(
        self, step: Step, defense: Defense, batch: Any, ranks: Ranks
    ) -> tuple[PerturbationSite, ForwardPasses] | None:
        """The attacked values of a batch, and forward passes over it; ``None`` for a first batch whose step returned no loss."""
        recipe = defense.recipe
        if self.inspection is None and not self.plain:
            assert recipe.attack is not None
            inspection = self.examine(step, batch, defense.model, recipe.attack)
            # What the first batch shows may differ by rank; an attack through the step is right on every one.
            self.plain = not ranks.any(not self.plain, defense.device)
            if inspection is None:
                return None
        if self.plain:
            inputs, labels = self._target.read(batch)
            return self._target.inputs(batch, self._threat), defense.passes(inputs, labels, whole=self._whole)
        assert self.inspection is not None
        batch = map_tensors(batch, torch.clone)  # the user's step may modify its own batch
        inspection = self.inspection
        site = self._target.site(step, batch, self._threat, inspection.noise)
        if inspection.outputs is None and recipe.compares_classes:
            raise ValueError(
                f"Recipe {recipe.name!r} compares probabilities of classes, but the labels of the batch do not appear to be classes of the model's "
                "outputs. Choose a recipe that needs no classes, such as 'pgd-at', 'alp-features' or 'sat-features', or say where the logits are "
                "with outputs= or model=."
            )
        recorder = defense.recorder

        def run() -> None:
            with step.repeatable(site.values.device, inspection.noise):
                step(batch)

        recorder.attach(run, head=inspection.outputs == "head")
        return site, StepForwardPasses(
            step, site, self._target.labels(batch), inspection, recorder, compares=recipe.compares
        )

    def _no_gradient(self, step: Step, site: PerturbationSite) -> str:
        who = f"The loss of {step.name} of {type(step.module).__name__} does not depend on "
        perturb = self._target.perturb
        if perturb is not None:
            return f"{who}the output of perturb={perturb.path!r}. Name a submodule on which the loss depends, without a detach() after it."
        if not site.values.is_floating_point():
            return f"{who}the inputs differentiably. {integer_inputs_advice(site.values)}"
        return (
            f"{who}the inputs: look for a detach(), a no_grad() block, an argmax, or a cast to integers between the inputs and the loss. If the "
            "model reads other inputs, name them with inputs=, or name the submodule whose output is to be attacked with perturb=."
        )


def integer_inputs_advice(values: Tensor) -> str:
    """The part of an error message that says what to do if the inputs are integers."""
    return (
        f"The inputs are integers ({values.dtype}). For token ids or categorical columns, attack the output of the embedding layer: "
        'perturb="path.to.the.embedding", with ThreatModel(norm="l2", eps=..., bounds=None). Convert integer images with x.float() / 255.'
    )


def log_route(step: Step, seen: str, inspection: StepInspection) -> None:
    """Log why the attack goes through a step, although plain forward passes are faster.

    Args:
        step: the step that the attack runs.
        seen: name of the step that was inspected.
        inspection: the result of :func:`inspect_step`.
    """
    why = inspection.reason or "the labels of the batch do not appear to be classes of the model's outputs"
    log.info(
        "The attack goes through %s of %s, because a plain forward pass is not equivalent for %s: %s.",
        step.name,
        type(step.module).__name__,
        seen,
        why,
    )
