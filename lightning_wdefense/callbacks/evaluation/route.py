"""Which way the adversary goes in an evaluation: by plain forward passes of the model, or through the module's own steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_wdefense._compat import LightningModule, is_a, rank_zero_warn
from lightning_wdefense.attacks.labels import class_labels
from lightning_wdefense.attacks.steps.inspection import Look, first_look
from lightning_wdefense.attacks.steps.sites import Site
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.callbacks.evaluation.attacked_batch import AttackedBatch, ModelBatch, StepBatch
from lightning_wdefense.callbacks.evaluation.user_metrics import step_arguments
from lightning_wdefense.callbacks.route import integer_inputs_advice, log_route, needs_whole_batches
from lightning_wdefense.callbacks.target import Target
from lightning_wdefense.modules.state.isolation import isolated
from lightning_wdefense.modules.steps import Step, own_step

Place = tuple[int, int | None]
"""Index of a batch, and of its dataloader where there are several."""


class PlainPasses(NamedTuple):
    """PlainPasses forward passes.

    Attributes:
        whole: never over a part of a batch.
    """

    whole: bool


class EvaluationRoute:
    """The way through a module's evaluation, chosen at the first batch of each dataloader.

    What is climbed is the loss that the evaluation's own step returns, else the one it logs (a key with ``loss`` in it), else that of
    ``training_step`` on the batch: the first of them that depends on the inputs.

    Args:
        target: what is attacked.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._seen: dict[tuple[str, int], tuple[str, Look] | PlainPasses | None] = {}
        self._refused: TypeError | ValueError | None = None

    def attacked_batch(
        self, module: LightningModule, model: nn.Module, threat: ThreatModel, stage: str, batch: Any, place: Place
    ) -> AttackedBatch | None:
        """A batch as it is attacked; ``None`` for one that cannot be.

        Args:
            module: the user's.
            model: takes the inputs and returns logits.
            threat: the threat model.
            stage: ``"validation"`` or ``"test"``.
            batch: the batch.
            place: indices of the batch and of its dataloader, where there are several.
        """
        key = stage, place[1] or 0
        if key not in self._seen:
            try:
                self._seen[key] = self._examine(module, model, threat, stage, batch, place)
            except (TypeError, ValueError) as error:
                if place[1] is None:
                    raise
                self._seen[key], self._refused = None, error
                rank_zero_warn(f"{error} It is left out; name those that are attacked with dataloaders=[0].")
        found = self._seen[key]
        if found is None:
            return None
        target = self._target
        if isinstance(found, PlainPasses):
            _, labels = target.read(batch)
            inputs = target.inputs(batch, threat)
            return ModelBatch(model, inputs, labels, target.outputs, takes_parts=not found.whole)
        name, look = found
        step = _step(module, name, place)
        site = target.site(step, batch, threat, look.noise)
        return StepBatch(step, site, target.labels(batch), look, model, target.outputs)

    def is_left_out(self, stage: str, dataloader_idx: int) -> bool:
        """Whether the batches of a dataloader cannot be attacked."""
        return (stage, dataloader_idx) in self._seen and self._seen[stage, dataloader_idx] is None

    def check(self) -> None:
        """Refuse to go on where no dataloader can be attacked.

        Raises:
            ValueError: the last reason.
        """
        if self._refused is not None and not any(self._seen.values()):
            raise self._refused

    def _examine(
        self, module: LightningModule, model: nn.Module, threat: ThreatModel, stage: str, batch: Any, place: Place
    ) -> tuple[str, Look] | PlainPasses:
        target = self._target
        if target.through == "model":
            return PlainPasses(False)
        labels = target.labels(batch)
        reasons: list[str] = []
        looks: list[Look] = []
        site: Site | None = None
        # A step that optimises by itself returns no loss, and one that attacks by itself another one than the evaluation's.
        by_itself = not module.automatic_optimization or is_a(module, "WassersteinDefenseMixin")
        for name in (f"{stage}_step", "training_step")[: 1 if by_itself else 2]:
            step = _step(module, name, place)
            try:
                site = target.site(step, batch, threat)
                look = first_look(step, site, labels, model, target.pick)
            except Exception as error:
                if site is None and target.perturb is None:
                    raise  # the batch's own fault
                reasons.append(f"{name} failed on the batch ({type(error).__name__}: {error})")
                continue
            if look.attacks:
                reasons.append(f"{name} attacks by itself")
                continue
            looks.append(look)
            if look.loss is None:
                reasons.append(f"{name} returned and logged no loss")
            elif not look.depends:
                reasons.append(f"the loss of {name} does not depend on what is to be attacked")
            elif target.may_be_plain and look.plain and look.outputs == "model":
                return PlainPasses(needs_whole_batches(model, site.values, target.pick))
            else:
                found = self._step_to_attack(looks, stage, name)
                if found is None:
                    return PlainPasses(needs_whole_batches(model, site.values, target.pick))
                if target.may_be_plain:
                    log_route(_step(module, found[0], place), name, look)
                return found
        if target.may_be_plain and self._plain_pass_fits(model, batch, looks):
            return PlainPasses(False)
        what = f"A batch of the {stage} dataloader {place[1] or 0} cannot be attacked: {'; '.join(reasons)}."
        if site is not None and not site.values.is_floating_point():
            raise TypeError(f"{what} {integer_inputs_advice(site.values)}")
        if labels is None:
            target.batches.read(batch)  # or it says what it knows labels by
        raise ValueError(
            f"{what} Return the loss from {stage}_step, or log it under a key with 'loss' in it; or name what is attacked with inputs= or perturb=."
        )

    def _step_to_attack(self, looks: list[Look], stage: str, name: str) -> tuple[str, Look] | None:
        """The step to go through: the evaluation's own, where the logits that the loss of ``training_step`` showed are seen in it as well; ``None`` for plain passes.

        What ``training_step`` does besides, such as augmenting, is no part of the evaluation.
        """
        own, look = looks[0], looks[-1]
        if name != "training_step" or len(looks) < 2 or look.outputs is None or not look.by_sample:
            return name, look
        if look.outputs == "model":
            if not own.model_ran:
                return name, look
            pick = None if own.tensor else look.pick
            if own.plain and pick is None and self._target.may_be_plain:
                return None
            return f"{stage}_step", replace(look, noise=own.noise, pick=pick)
        return (name, look) if own.model_ran or not own.head_ran else (f"{stage}_step", replace(look, noise=own.noise))

    def _plain_pass_fits(self, model: nn.Module, batch: Any, looks: list[Look]) -> bool:
        """Whether, for want of a loss, a plain pass may be taken: none of the steps was seen to run the model on anything else."""
        if any(look.model_ran and not look.plain for look in looks):
            return False
        try:
            inputs, labels = self._target.read(batch)
            with isolated(model, inputs.device), torch.no_grad():
                class_labels(labels, self._target.pick(model(inputs.clone())))
        except Exception:
            return False
        return True


def _step(module: LightningModule, name: str, place: Place) -> Step:
    function = own_step(module, name)
    arguments = step_arguments(function, place[0], None if name == "training_step" else place[1])
    return Step(module, function, name, arguments)
