"""Which way the adversary goes: by plain forward passes of the model, or through the module's own step."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import rank_zero_warn
from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.first_look import ConsumedError, Look, first_look, part_differs
from lightning_wdefense.attacks.labels import ignoring
from lightning_wdefense.attacks.places import InputSite, Perturb, Site
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.passes import Passes, StepPasses
from lightning_wdefense.modules.batches import Batches
from lightning_wdefense.modules.outputs import Pick, picking
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.steps import Step

Through = Literal["auto", "model", "step"]


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
        self._whole = False

    def labels(self, batch: Any) -> Any:
        """The labels of a batch, if there are any."""
        return ignoring(self._batches.labels_or_none(batch), self._ignore_index)

    def site(self, step: Step, batch: Any) -> Site:
        """What the adversary moves in a batch."""
        if self._perturb is None:
            return InputSite(self._batches, batch, self._threat)

        def run() -> None:
            with step.rehearsal(module_device(step.module), "off" if self.look is None else self.look.noise):
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
        if self.plain and model is not None:
            self._whole = keeps_whole(model, site.values, self._pick)
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
            labels = labels if self._ignore_index is None else ignoring(labels, self._ignore_index)
            return plain, defense.passes(inputs, labels, whole=self._whole)
        assert self.look is not None
        batch = map_tensors(batch, torch.clone)  # the user's step may write to its own
        site, look = self.site(step, batch), self.look
        if look.outputs is None and recipe.compares_classes:
            raise ValueError(
                f"Recipe {recipe.name!r} compares probabilities of classes, and the labels of the batch are not seen to be classes of the model's "
                "outputs: choose one that does not, such as 'pgd-at', 'alp-features' or 'sat-features', or say where the logits are with outputs= "
                "or model=."
            )
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
            return f"{who}the inputs differentiably. {integers(site.values)}"
        return (
            f"{who}the inputs: is there a detach(), a no_grad() block, an argmax, or a cast to integers on the way? Or are these not the "
            "inputs that the model reads: name those with inputs=, or the submodule whose output is to be attacked with perturb=."
        )


def integers(values: Tensor) -> str:
    """What to do where the inputs are integers."""
    return (
        f"The inputs are integers ({values.dtype}). Of token ids or categorical columns attack the output of the layer that embeds them, "
        'perturb="path.to.the.embedding", with ThreatModel(norm="l2", eps=..., bounds=None); convert integer images with x.float() / 255.'
    )


def module_device(module: Any) -> torch.device:
    """Where a module runs."""
    device = getattr(module, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")


def keeps_whole(model: nn.Module, values: Tensor, pick: Any) -> bool:
    """Whether plain passes must take whole batches, which a warning says."""
    reason = part_differs(model, values, pick or (lambda outputs: outputs))
    if reason:
        rank_zero_warn(f"The model is not run on parts of a batch ({reason}), but on whole ones, which takes longer.")
    return bool(reason)
