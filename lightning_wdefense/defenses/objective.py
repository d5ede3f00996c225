"""Combines the terms of a recipe into the training loss, for the callback and the mixin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense._ranks import ALONE, Ranks
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.terms import Terms
from lightning_wdefense.modules.outputs import float32_or_better, logits_of


def mart_margin_loss(outputs: Any, labels: Any) -> Tensor:
    """``-log(1 - max_{k != y} p_k)``, the mean over the batch: the margin term of MART's boosted cross-entropy.

    Args:
        outputs: logits ``(N, K, ...)`` on adversarial inputs.
        labels: classes ``(N, ...)`` or class probabilities ``(N, K, ...)``.

    References:
        Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.
    """
    logits = float32_or_better(logits_of(outputs))
    classes = hard_labels(class_labels(labels, outputs, check_values=True))
    others = F.log_softmax(logits, 1).scatter(1, classes.clamp_min(0).unsqueeze(1), -torch.inf).amax(1)
    # log(1 - p) computed from log p, without loss of precision near p = 0 and p = 1.
    return -torch.log(-torch.expm1(others.clamp_max(-torch.finfo(logits.dtype).eps)))[not_ignored(classes)].mean()


def combine(
    recipe: Terms,
    task_loss: Tensor,
    clean: Branch | None,
    adversarial: Branch | None,
    labels: Any,
    discrepancy: Callable[[Branch, Branch, Any], Tensor],
    *,
    slope: Callable[[Branch, Branch, Tensor | None], Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, dict[str, Any]]:
    """The training loss: the task loss and, with their weights, the other terms of the recipe.

    It is ``task_loss + reweighting + other_weight * task(other) + margin_weight * margin_loss + weight * discrepancy +
    jacobian_weight * jacobian``.

    Args:
        recipe: the recipe, which gives the weights.
        task_loss: the loss on the inputs that the user's step got, a scalar.
        clean: outputs and features of the clean inputs; may be ``None`` if no term needs them.
        adversarial: outputs and features of the adversarial inputs; may be ``None`` if no term needs them.
        labels: labels of the batch.
        discrepancy: the recipe's discrepancy, ``(clean, adversarial, labels) -> scalar``.
        slope: ``(clean, adversarial, discrepancy or None) -> scalar``, the Jacobian term, if the recipe has one.
        ranks: the ranks that train the model together, whose samples are reweighted together.

    Returns:
        The loss, and its detached parts: ``loss`` (the sum), ``task_loss``, and ``other_loss``, ``margin_loss``, ``discrepancy``,
        ``jacobian`` (without weights) and ``reweighting`` if the recipe has them; with reweighting, also measurements of the weights.

    Raises:
        FloatingPointError: if a part is NaN or infinite; the message names the part.
    """
    parts = {"task_loss": task_loss}
    loss = task_loss
    measured: dict[str, Tensor] = {}
    if recipe.reweighting is not None:
        seen = clean if recipe.sees == "clean" else adversarial
        parts["reweighting"], measured = recipe.reweighting.added(None if seen is None else seen.outputs, labels, ranks)
        loss = loss + parts["reweighting"]
    if recipe.other_weight > 0:
        other = clean if recipe.sees == "adversarial" else adversarial
        assert other is not None
        parts["other_loss"] = recipe.task_loss(other.outputs, labels) if other.loss is None else other.loss
        loss = loss + recipe.other_weight * parts["other_loss"]
    if recipe.weight > 0:
        assert clean is not None
        assert adversarial is not None
        parts["discrepancy"] = discrepancy(clean, adversarial, labels)
        loss = loss + recipe.weight * parts["discrepancy"]
    if recipe.margin_weight > 0:
        assert adversarial is not None
        parts["margin_loss"] = mart_margin_loss(adversarial.outputs, labels)
        loss = loss + recipe.margin_weight * parts["margin_loss"]
    if recipe.jacobian_weight > 0:
        assert clean is not None
        assert adversarial is not None
        assert slope is not None
        parts["jacobian"] = slope(clean, adversarial, parts.get("discrepancy"))
        loss = loss + recipe.jacobian_weight * parts["jacobian"]
    if not bool(torch.isfinite(loss).all()):
        _raise_not_finite(recipe, parts)
    return loss, {name: part.detach() for name, part in ({"loss": loss} | parts | measured).items()}


def _raise_not_finite(recipe: Terms, parts: dict[str, Tensor]) -> None:
    culprits = [name for name, part in parts.items() if not bool(torch.isfinite(part).all())]
    values = ", ".join(f"{name} = {float(part.detach().float().mean()):.4g}" for name, part in parts.items())
    advice = {
        "task_loss": "task_loss is the training_step's own loss: lower the learning rate, clip gradients, or check the data",
        "other_loss": "other_loss is the task loss on the other branch's outputs: check that the labels fit the task loss",
        "reweighting": "reweighting are the losses of the samples: look for one that is not finite",
        "jacobian": f"lower jacobian_weight={recipe.jacobian_weight}",
        "margin_loss": f"lower margin_weight={recipe.margin_weight}",
        "discrepancy": f"lower weight={recipe.weight}, or choose other features than {recipe.features!r}",
    }
    hints = (
        "; ".join(advice[name] for name in culprits) or "the weighted sum is too large for its dtype: lower the weights"
    )
    raise FloatingPointError(f"The loss of recipe {recipe.name!r} is not finite ({values}): {hints}.")
