"""Which way the adversary goes: by plain forward passes of the model, or through the module's own step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import rank_zero_warn
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.steps.inspection import ConsumedError, Look, first_look, part_differs
from lightning_wdefense.attacks.steps.sites import Site
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.callbacks.target import Target
from lightning_wdefense.defenses.defense import Defense
from lightning_wdefense.defenses.forward_passes import ForwardPasses, StepPasses
from lightning_wdefense.modules.paths import map_tensors
from lightning_wdefense.modules.steps import Step

log = logging.getLogger(__name__)


class Route:
    """The way through one module, chosen at its first batch.

    A plain forward pass is the fast way: losses by sample, early exit, restarts. It is taken where a first look at the step shows it to be
    the same computation: the model ran once, on the batch's own tensor and nothing else, and its outputs are logits of the classes
    that are the labels (measured: the loss falls in the logit of the own class), or what a loss of the user's own reads. Else the
    adversary goes through the step.

    Args:
        target: what is attacked.
        threat: the threat model.
    """

    def __init__(self, target: Target, threat: ThreatModel) -> None:
        self._target, self._threat = target, threat
        self.look: Look | None = None
        self.plain = target.through == "model"
        self._whole = False

    def examine(self, step: Step, batch: Any, model: nn.Module | None, attack: Attack) -> Look | None:
        """Take the first look at a step, and choose the way; ``None`` where there is no loss to look at.

        Raises:
            ValueError: if the step returns something without a loss, or a loss that does not depend on what the adversary moves.
        """
        target = self._target
        site, labels = target.site(step, batch, self._threat), target.labels(batch)
        try:
            look = first_look(step, site, labels, model, target.pick)
        except ConsumedError:
            raise
        except Exception as error:
            if not target.may_be_plain or model is None:
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
            target.may_be_plain and look.plain and (look.outputs == "model" or callable(getattr(attack, "loss", None)))
        )
        if not self.plain and not look.depends:
            raise ValueError(self._no_gradient(step, site))
        if self.plain and model is not None:
            self._whole = needs_whole_batches(model, site.values, target.pick)
        if not self.plain and target.may_be_plain:
            log_route(step, step.name, look)
        self.look = look
        return look

    def passes(self, step: Step, defense: Defense, batch: Any) -> tuple[Site, ForwardPasses] | None:
        """ForwardPasses over a batch, and what the adversary moves in it; ``None`` for a first batch whose step returned no loss."""
        recipe = defense.recipe
        if self.look is None and not self.plain:
            assert recipe.attack is not None
            look = self.examine(step, batch, defense.model, recipe.attack)
            if look is None:
                return None
        if self.plain:
            inputs, labels = self._target.read(batch)
            return self._target.inputs(batch, self._threat), defense.passes(inputs, labels, whole=self._whole)
        assert self.look is not None
        batch = map_tensors(batch, torch.clone)  # the user's step may write to its own
        look = self.look
        site = self._target.site(step, batch, self._threat, look.noise)
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
        return site, StepPasses(step, site, self._target.labels(batch), look, recorder, compares=recipe.compares)

    def _no_gradient(self, step: Step, site: Site) -> str:
        who = f"The loss of {step.name} of {type(step.module).__name__} does not depend on "
        perturb = self._target.perturb
        if perturb is not None:
            return f"{who}the output of perturb={perturb.path!r}: name a submodule that it depends on, without detach() behind it."
        if not site.values.is_floating_point():
            return f"{who}the inputs differentiably. {integer_inputs_advice(site.values)}"
        return (
            f"{who}the inputs: is there a detach(), a no_grad() block, an argmax, or a cast to integers on the way? Or are these not the "
            "inputs that the model reads: name those with inputs=, or the submodule whose output is to be attacked with perturb=."
        )


def integer_inputs_advice(values: Tensor) -> str:
    """What to do where the inputs are integers."""
    return (
        f"The inputs are integers ({values.dtype}). Of token ids or categorical columns attack the output of the layer that embeds them, "
        'perturb="path.to.the.embedding", with ThreatModel(norm="l2", eps=..., bounds=None); convert integer images with x.float() / 255.'
    )


def log_route(step: Step, seen: str, look: Look) -> None:
    """Log why the adversary goes through a step, though the plain forward pass is faster.

    Args:
        step: the step that is taken.
        seen: the step that was looked at.
        look: what was seen of it.
    """
    why = look.why or "the labels of the batch are not seen to be classes of the model's outputs"
    log.info(
        "The adversary goes through %s of %s; a plain forward pass would not do for %s: %s.",
        step.name,
        type(step.module).__name__,
        seen,
        why,
    )


def needs_whole_batches(model: nn.Module, values: Tensor, pick: Callable[[Any], Any]) -> bool:
    """Whether plain passes must take whole batches, which a warning says."""
    reason = part_differs(model, values, pick)
    if reason:
        rank_zero_warn(f"The model is not run on parts of a batch ({reason}), but on whole ones, which takes longer.")
    return bool(reason)
