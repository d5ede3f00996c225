"""Which way the adversary goes: by plain forward passes of the model, or through the module's own step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import LightningModule, rank_zero_warn
from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.first_look import ConsumedError, Look, first_look
from lightning_wdefense.attacks.labels import class_labels, ignoring
from lightning_wdefense.attacks.places import InputSite, Perturb, Site
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.callbacks.shadow import step_arguments
from lightning_wdefense.callbacks.subject import ModelSubject, StepSubject, Subject
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.passes import Passes, StepPasses
from lightning_wdefense.modules.batches import Batches
from lightning_wdefense.modules.isolation import isolated
from lightning_wdefense.modules.outputs import Pick, picking
from lightning_wdefense.modules.steps import Noise, Step, own_step

Through = Literal["auto", "model", "step"]

Place = tuple[int, int | None]
"""Index of a batch, and of its dataloader where there are several."""


def check_through(through: str, perturb: Perturb | None) -> None:
    """Refuse what is no way.

    Raises:
        ValueError: for an unknown one, or plain forward passes beside ``perturb=``.
    """
    if through not in get_args(Through):
        raise ValueError(unknown_name("way for through=", through, get_args(Through)))
    if through == "model" and perturb is not None:
        raise ValueError(f"perturb={perturb.path!r} acts inside of the step: leave through= out, or set it to 'step'.")


class Way:
    """The way through one module, chosen at its first batch.

    A plain forward pass is the fast way: losses by sample, early exit, restarts. It is taken where a first look at the step shows it to be
    the same computation: the model ran once, on the batch's own tensor and nothing else, and its outputs are logits of the classes
    that are the labels (measured: the loss falls in the logit of the own class), or what a loss of the user's own reads. Else the
    adversary goes through the step.

    Args:
        through: ``"auto"``, or one of the two.
        batches: finds inputs and labels.
        threat: the threat model.
        perturb: the submodule whose output is attacked, if it is not the inputs.
        outputs: where in what the model returns its outputs are.
        ignore_index: label of elements that count for nothing.
    """

    def __init__(
        self,
        through: Through,
        batches: Batches,
        threat: ThreatModel,
        *,
        perturb: Perturb | None = None,
        outputs: Pick = None,
        ignore_index: int | None = None,
    ) -> None:
        self.through, self._batches, self._threat = through, batches, threat
        self._perturb, self._pick, self._ignore_index = perturb, picking(outputs), ignore_index
        self.look: Look | None = None
        self.plain = through == "model"

    def labels(self, batch: Any) -> Any:
        """The labels of a batch, if there are any."""
        return ignoring(self._batches.labels_or_none(batch), self._ignore_index)

    def site(self, step: Step, batch: Any) -> Site:
        """What the adversary moves in a batch."""
        if self._perturb is None:
            return InputSite(self._batches, batch, self._threat)

        def run() -> None:
            with step.rehearsal(_device(step.module), "off" if self.look is None else self.look.noise):
                step(batch)

        return self._perturb.site(step.module, batch, self._threat, run)

    def examine(self, step: Step, batch: Any, model: nn.Module | None, attack: Attack) -> Look | None:
        """Take the first look at a step, and choose the way; ``None`` where there is no loss to look at.

        Raises:
            ValueError: if the step returns something without a loss, or a loss that does not depend on what the adversary moves.
        """
        site, labels = self.site(step, batch), self.labels(batch)
        try:
            look = first_look(step, site, labels, model, self._pick or (lambda outputs: outputs))
        except ConsumedError:
            raise
        except Exception as error:
            if self.through == "step" or self._perturb is not None or model is None:
                raise
            warnings.warn(
                f"A first look at {step.name} failed ({type(error).__name__}: {error}), so the adversary takes plain forward passes.",
                stacklevel=2,
            )
            self.plain = True
            return Look()
        if look.loss is None:
            return None
        self.plain = (
            self.through == "auto"
            and self._perturb is None
            and look.plain
            and (look.outputs == "model" or callable(getattr(attack, "loss", None)))
        )
        if not self.plain and not look.depends:
            raise ValueError(self._no_gradient(step, site))
        self.look = look
        return look

    def passes(self, step: Step, defense: Defense, batch: Any) -> tuple[Site, Passes] | None:
        """Passes over a batch, and what the adversary moves in it; ``None`` for a first batch whose step returned no loss."""
        recipe = defense.recipe
        if self.look is None and not self.plain:
            assert recipe.attack is not None
            look = self.examine(step, batch, defense.model, recipe.attack)
            if look is None:
                return None
        if self.plain:
            inputs, labels = self._batches.read(batch)
            plain = InputSite(self._batches, batch, self._threat)
            return plain, defense.passes(inputs, ignoring(labels, self._ignore_index) if self._ignore_index else labels)
        assert self.look is not None
        site, look = self.site(step, batch), self.look
        recorder = defense.recorder

        def run() -> None:
            with step.rehearsal(site.values.device, look.noise):
                step(batch)

        recorder.attach(run, head=look.outputs == "head")
        return site, StepPasses(step, site, self.labels(batch), look, recorder, compares=recipe.compares)

    def _no_gradient(self, step: Step, site: Site) -> str:
        who = f"The loss of {step.name} of {type(step.module).__name__} does not depend on "
        if self._perturb is not None:
            return f"{who}the output of perturb={self._perturb.path!r}: name a submodule that it depends on, without detach() behind it."
        if not site.values.is_floating_point():
            return f"{who}the inputs differentiably. {_integers(site.values)}"
        return (
            f"{who}the inputs: is there a detach(), a no_grad() block, an argmax, or a cast to integers on the way? Or are these not the "
            "inputs that the model reads: name those with inputs=, or the submodule whose output is to be attacked with perturb=."
        )


def _integers(values: Tensor) -> str:
    return (
        f"The inputs are integers ({values.dtype}). Of token ids or categorical columns attack the output of the layer that embeds them, "
        'perturb="path.to.the.embedding", with ThreatModel(norm="l2", eps=..., bounds=None); convert integer images with x.float() / 255.'
    )


def _device(module: Any) -> torch.device:
    device = getattr(module, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


class EvaluationWay:
    """The way through a module's evaluation, chosen at the first batch of each dataloader.

    What is climbed is the loss that the evaluation's own step returns, else the one it logs (a key with ``loss`` in it), else that of
    ``training_step`` on the batch: the first of them that depends on the inputs.

    Args:
        through: ``"auto"``, or one of the two.
        batches: finds inputs and labels.
        perturb: the submodule whose output is attacked, if it is not the inputs.
        outputs: where in what the model returns its outputs are.
        ignore_index: label of elements that count for nothing.
    """

    def __init__(
        self,
        through: Through,
        batches: Batches,
        *,
        perturb: Perturb | None = None,
        outputs: Pick = None,
        ignore_index: int | None = None,
    ) -> None:
        self.through, self._batches, self._perturb = through, batches, perturb
        self._outputs, self._ignore_index = outputs, ignore_index
        self._seen: dict[tuple[str, int], tuple[str, Look] | Literal["model"] | None] = {}
        self._refused: TypeError | ValueError | None = None

    def subject(
        self, module: LightningModule, model: nn.Module, threat: ThreatModel, stage: str, batch: Any, place: Place
    ) -> Subject | None:
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
        if found == "model":
            _, labels = self._batches.read(batch)
            return ModelSubject(model, InputSite(self._batches, batch, threat), labels, self._outputs)
        name, look = found
        step = _step(module, name, place)
        site = self._site(step, batch, threat, look.noise)
        return StepSubject(step, site, self._labels(batch), look, model, self._outputs)

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

    def _labels(self, batch: Any) -> Any:
        return self._batches.labels_or_none(batch)

    def _site(self, step: Step, batch: Any, threat: ThreatModel, noise: Noise) -> Site:
        if self._perturb is None:
            return InputSite(self._batches, batch, threat)

        def run() -> None:
            with step.rehearsal(_device(step.module), noise):
                step(batch)

        return self._perturb.site(step.module, batch, threat, run)

    def _examine(
        self, module: LightningModule, model: nn.Module, threat: ThreatModel, stage: str, batch: Any, place: Place
    ) -> tuple[str, Look] | Literal["model"] | None:
        if self.through == "model":
            return "model"
        pick = picking(self._outputs) or (lambda outputs: outputs)
        labels = ignoring(self._labels(batch), self._ignore_index)
        reasons: list[str] = []
        looks: list[Look] = []
        site: Site | None = None
        for name in (f"{stage}_step", "training_step"):
            step = _step(module, name, place)
            try:
                site = self._site(step, batch, threat, "off")
                look = first_look(step, site, labels, model, pick)
            except Exception as error:
                if site is None and self._perturb is None:
                    raise  # the batch's own fault
                reasons.append(f"{name} failed on the batch ({type(error).__name__}: {error})")
                continue
            looks.append(look)
            if look.loss is None:
                reasons.append(f"{name} returned and logged no loss")
            elif not look.depends:
                reasons.append(f"the loss of {name} does not depend on what is to be attacked")
            elif self.through == "auto" and self._perturb is None and look.plain and look.outputs == "model":
                return "model"
            else:
                return self._evaluated(looks, stage, name, len(site.values))
        if self.through == "auto" and self._perturb is None and self._fits(model, batch, looks):
            return "model"
        what = f"A batch of the {stage} dataloader {place[1] or 0} cannot be attacked: {'; '.join(reasons)}."
        if site is not None and not site.values.is_floating_point():
            raise TypeError(f"{what} {_integers(site.values)}")
        if labels is None:
            self._batches.read(batch)  # or it says what it knows labels by
        raise ValueError(
            f"{what} Return the loss from {stage}_step, or log it under a key with 'loss' in it; or name what is attacked with inputs= or perturb=."
        )

    def _evaluated(self, looks: list[Look], stage: str, name: str, rows: int) -> tuple[str, Look] | Literal["model"]:
        """The step to go through: the evaluation's own, where the logits that the loss of ``training_step`` showed are seen in it as well.

        What ``training_step`` does besides, such as augmenting, is no part of the evaluation.
        """
        own, look = looks[0], looks[-1]
        if name != "training_step" or len(looks) < 2 or look.outputs is None or look.rows != rows:
            return name, look
        if look.outputs == "model":
            if not own.model_ran:
                return name, look
            pick = None if own.tensor else look.pick
            if own.plain and pick is None and self.through == "auto" and self._perturb is None:
                return "model"
            return f"{stage}_step", replace(look, noise=own.noise, pick=pick)
        return (name, look) if own.model_ran or not own.head_ran else (f"{stage}_step", replace(look, noise=own.noise))

    def _fits(self, model: nn.Module, batch: Any, looks: list[Look]) -> bool:
        """Whether, for want of a loss, a plain pass may be taken: none of the steps was seen to run the model on anything else."""
        if any(look.model_ran and not look.plain for look in looks):
            return False
        try:
            inputs, labels = self._batches.read(batch)
            with isolated(model, inputs.device), torch.no_grad():
                class_labels(
                    ignoring(labels, self._ignore_index),
                    (picking(self._outputs) or (lambda o: o))(model(inputs.clone())),
                )
        except Exception:
            return False
        return True


def _step(module: LightningModule, name: str, place: Place) -> Step:
    function = own_step(module, name)
    arguments = step_arguments(function, place[0], None if name == "training_step" else place[1])
    return Step(module, function, name, arguments)
