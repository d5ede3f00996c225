"""Chooses how attacks in evaluation run the model: by plain forward passes, or through the module's own steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_wdefense._compat import LightningModule, is_a, rank_zero_warn
from lightning_wdefense.attacks.labels import class_labels
from lightning_wdefense.attacks.steps.inspection import StepInspection, inspect_step, needs_whole_batches
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.callbacks.evaluation.user_metrics import step_arguments
from lightning_wdefense.callbacks.route import integer_inputs_advice, log_route
from lightning_wdefense.callbacks.target import Target
from lightning_wdefense.evaluation.attacked_batch import AttackedBatch, ModelBatch, StepBatch
from lightning_wdefense.modules.state.isolation import isolated
from lightning_wdefense.modules.steps import Step, unwrapped_step

Place = tuple[int, int | None]
"""Index of a batch, and index of its dataloader; the latter is ``None`` if there is only one dataloader."""


class PlainPasses(NamedTuple):
    """The attack uses plain forward passes of the model.

    Attributes:
        whole: whether the model must run whole batches, never a part of one.
    """

    whole: bool


class EvaluationRoute:
    """How attacks run a module in evaluation, chosen at the first batch of each dataloader.

    An attack through a step maximises the first of these losses that depends on the inputs: the loss that the evaluation step
    returns; the loss that it logs (a key with ``loss`` in it); the loss of ``training_step`` on the batch.

    Args:
        target: what is attacked.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._seen: dict[tuple[str, int], tuple[str, StepInspection] | PlainPasses | None] = {}
        self._refused: TypeError | ValueError | None = None

    def attacked_batch(
        self, module: LightningModule, model: nn.Module, threat: ThreatModel, stage: str, batch: Any, place: Place
    ) -> AttackedBatch | None:
        """The batch in the form that attacks need; ``None`` for a batch that cannot be attacked.

        Args:
            module: the user's module.
            model: takes the inputs and returns logits.
            threat: the threat model.
            stage: ``"validation"`` or ``"test"``.
            batch: the batch.
            place: index of the batch, and index of its dataloader if there are several.
        """
        key = stage, place[1] or 0
        if key not in self._seen:
            try:
                self._seen[key] = self._examine(module, model, threat, stage, batch, place)
            except (TypeError, ValueError) as error:
                if place[1] is None:
                    raise
                self._seen[key], self._refused = None, error
                rank_zero_warn(
                    f"{error} This dataloader is left out. To avoid the warning, name the others, such as dataloaders=[0]."
                )
        found = self._seen[key]
        if found is None:
            return None
        target = self._target
        if isinstance(found, PlainPasses):
            _, labels = target.read(batch)
            inputs = target.inputs(batch, threat)
            return ModelBatch(model, inputs, labels, target.outputs, accepts_partial_batches=not found.whole)
        name, inspection = found
        step = _step(module, name, place)
        site = target.site(step, batch, threat, inspection.noise)
        return StepBatch(step, site, target.labels(batch), inspection, model, target.outputs)

    def is_left_out(self, stage: str, dataloader_idx: int) -> bool:
        """Whether the batches of a dataloader cannot be attacked."""
        return (stage, dataloader_idx) in self._seen and self._seen[stage, dataloader_idx] is None

    def check(self) -> None:
        """Raise an error if no dataloader can be attacked.

        Raises:
            ValueError: with the reason for the last dataloader.
        """
        if self._refused is not None and not any(self._seen.values()):
            raise self._refused

    def _examine(
        self, module: LightningModule, model: nn.Module, threat: ThreatModel, stage: str, batch: Any, place: Place
    ) -> tuple[str, StepInspection] | PlainPasses:
        target = self._target
        if target.through == "model":
            return PlainPasses(False)
        labels = target.labels(batch)
        reasons: list[str] = []
        inspections: list[StepInspection] = []
        site: PerturbationSite | None = None
        # With manual optimisation training_step returns no loss; with the mixin it attacks by itself, so its loss is another one.
        by_itself = not module.automatic_optimization or is_a(module, "WassersteinDefenseMixin")
        for name in (f"{stage}_step", "training_step")[: 1 if by_itself else 2]:
            step = _step(module, name, place)
            try:
                site = target.site(step, batch, threat)
                inspection = inspect_step(step, site, labels, model, target.pick)
            except Exception as error:
                if site is None and target.perturb is None:
                    raise  # the batch itself cannot be read
                reasons.append(f"{name} failed on the batch ({type(error).__name__}: {error})")
                continue
            if inspection.runs_attack:
                reasons.append(f"{name} attacks by itself")
                continue
            inspections.append(inspection)
            if inspection.loss is None:
                reasons.append(f"{name} returned and logged no loss")
            elif not inspection.differentiable:
                reasons.append(f"the loss of {name} does not depend on the attacked values")
            elif target.may_be_plain and inspection.plain and inspection.outputs == "model":
                return PlainPasses(needs_whole_batches(model, site.values, target.pick))
            else:
                found = self._step_to_attack(inspections, stage, name)
                if found is None:
                    return PlainPasses(needs_whole_batches(model, site.values, target.pick))
                if target.may_be_plain:
                    log_route(_step(module, found[0], place), name, inspection)
                return found
        if target.may_be_plain and self._plain_pass_fits(model, batch, inspections):
            return PlainPasses(False)
        what = f"A batch of the {stage} dataloader {place[1] or 0} cannot be attacked: {'; '.join(reasons)}."
        if site is not None and not site.values.is_floating_point():
            raise TypeError(f"{what} {integer_inputs_advice(site.values)}")
        if labels is None:
            target.batches.read(batch)  # raises an error that names the known keys of labels
        raise ValueError(
            f"{what} Return the loss from {stage}_step, or log it under a key with 'loss' in it. Or name the attacked values with inputs= or "
            "perturb=."
        )

    def _step_to_attack(
        self, inspections: list[StepInspection], stage: str, name: str
    ) -> tuple[str, StepInspection] | None:
        """The step that the attack runs, with its inspection; ``None`` for plain forward passes.

        If the loss of ``training_step`` shows which outputs are logits, and the evaluation step has the same outputs, then the attack
        runs the evaluation step: augmentation in ``training_step``, for example, is no part of the evaluation.
        """
        own, inspection = inspections[0], inspections[-1]
        if name != "training_step" or len(inspections) < 2 or inspection.outputs is None or not inspection.by_sample:
            return name, inspection
        if inspection.outputs == "model":
            if not own.model_calls:
                return name, inspection
            pick = None if own.tensor else inspection.pick
            if own.plain and pick is None and self._target.may_be_plain:
                return None
            return f"{stage}_step", replace(inspection, noise=own.noise, pick=pick)
        return (
            (name, inspection)
            if own.model_calls or not own.head_ran
            else (f"{stage}_step", replace(inspection, noise=own.noise))
        )

    def _plain_pass_fits(self, model: nn.Module, batch: Any, inspections: list[StepInspection]) -> bool:
        """Whether plain forward passes may be used without a loss: no step ran the model on anything but the batch's inputs."""
        if any(inspection.model_calls and not inspection.plain for inspection in inspections):
            return False
        try:
            inputs, labels = self._target.read(batch)
            with isolated(model, inputs.device), torch.no_grad():
                class_labels(labels, self._target.pick(model(inputs.clone())))
        except Exception:
            return False
        return True


def _step(module: LightningModule, name: str, place: Place) -> Step:
    function = unwrapped_step(module, name)
    arguments = step_arguments(function, place[0], None if name == "training_step" else place[1])
    return Step(module, function, name, arguments)
