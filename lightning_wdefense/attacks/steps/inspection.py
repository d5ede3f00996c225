"""Inspect a module's step on one batch: what it computes, and whether a plain forward pass computes the same."""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import rank_zero_warn
from lightning_wdefense.attacks.steps.classification import SAME_LOSS, is_classification
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.modules.attachments import attach_hook
from lightning_wdefense.modules.autograd import gradients
from lightning_wdefense.modules.outputs import tensor_of
from lightning_wdefense.modules.parallel import is_sharded
from lightning_wdefense.modules.recording import CONVOLUTIONS
from lightning_wdefense.modules.state.isolation import eager, internal_pass_depth, isolated
from lightning_wdefense.modules.state.step_state import iterators_of
from lightning_wdefense.modules.steps import Noise, Step

Source = Literal["model", "head"]


@dataclass
class StepInspection:
    """The result of :func:`inspect_step`.

    Attributes:
        noise: how to run the step: ``"off"`` for eval mode; ``"training"`` if the step returns no loss in eval mode.
        loss: the loss of the clean batch; ``None`` if the step returns none.
        differentiable: whether the loss has a gradient with respect to the values that the adversary perturbs.
        plain: whether the model ran once, on these values only, so that a plain forward pass computes the same outputs.
        outputs: where the logits of a classifier are: ``"model"`` for the model's outputs, ``"head"`` for the outputs
            of the last linear layer; ``None`` if neither are logits.
        pick: finds the logits in the model's outputs; ``None`` if the outputs are the logits.
        by_sample: whether there is one row of logits for each row of the values.
        model_calls: number of calls of the model.
        tensor: whether the model returned a single tensor.
        head_ran: whether a linear layer ran.
        runs_attack: whether the step itself runs an attack.
        reason: why a plain forward pass is a different computation; empty if it is the same.
    """

    noise: Noise = "off"
    loss: float | None = None
    differentiable: bool = False
    plain: bool = False
    outputs: Source | None = None
    pick: Callable[[Any], Any] | None = None
    by_sample: bool = False
    model_calls: int = 0
    tensor: bool = False
    head_ran: bool = False
    runs_attack: bool = False
    reason: str = ""


def inspect_step(
    step: Step,
    site: PerturbationSite,
    labels: Any,
    model: nn.Module | None,
    pick: Callable[[Any], Any],
) -> StepInspection:
    """Run the step twice on a clean batch, without side effects, and record what it computes.

    Args:
        step: the step.
        site: the batch, and the values that the adversary perturbs in it.
        labels: the labels of the batch; ``None`` if there are none.
        model: the model whose calls are recorded; ``None`` for none.
        pick: finds the outputs in what the model returns.

    Raises:
        ConsumedIteratorError: if the step reads from an iterator, which cannot be restored.
        Exception: any error of the step.
    """
    failed: Exception | None = None
    inspection = StepInspection()
    noises: tuple[Noise, ...] = ("off", "training") if step.name == "training_step" else ("off",)
    for noise in noises:
        try:
            inspection = _inspect(step, site, labels, model, pick, noise)
        except StopIteration as error:
            raise _consumed(step) from error
        except ConsumedIteratorError:
            raise
        except Exception as error:
            failed = error
            continue
        failed = None
        if inspection.loss is not None:
            break
    if failed is not None:
        raise failed
    return inspection


def _inspect(
    step: Step, site: PerturbationSite, labels: Any, model: nn.Module | None, pick: Callable[[Any], Any], noise: Noise
) -> StepInspection:
    inspection, calls, heads = StepInspection(noise), list[Any](), list[Any]()
    with eager(), step.repeatable(site.values.device, noise):
        values = site.values.detach().clone()
        if values.is_floating_point():
            values.requires_grad_()
        with _watching(step.module, model, calls, heads, inspection), site.perturbed(values) as batch:
            loss = step.loss(batch)
        inspection.model_calls, inspection.head_ran = len(calls), bool(heads)
        inspection.tensor = bool(calls) and isinstance(pick(calls[0][2]), Tensor)
        inspection.reason = _difference(calls, values, model)
        inspection.plain = not inspection.reason
        if loss is None:
            return inspection
        inspection.loss = float(loss.detach())
        inspection.differentiable = (
            values.requires_grad and loss.requires_grad and gradients(loss, [values], retain_graph=True)[0] is not None
        )
        inspection.outputs, inspection.pick, rows = _classifier(calls, heads, labels, loss, pick)
        inspection.by_sample = rows == len(values)
        if inspection.pick is not None:
            inspection.plain, inspection.reason = False, f"{type(model).__name__} returns several outputs"
        with site.perturbed(site.values.detach().clone()) as batch:
            again = step.loss(batch)
    moved = again is None or abs(float(again.detach()) - inspection.loss) > SAME_LOSS * (1e-6 + abs(inspection.loss))
    if moved and iterators_of(step.module):
        raise _consumed(step)
    if moved and math.isfinite(inspection.loss):
        warnings.warn(
            f"{step.name} of {type(step.module).__name__} returned two different losses for the same batch, {inspection.loss:.6g} and "
            f"{'none' if again is None else format(float(again.detach()), '.6g')}: it uses state that cannot be restored (its own random "
            "generator, or state outside of the module). So the loss changes during the attack, and the attack may be too weak.",
            stacklevel=2,
        )
    return inspection


def needs_whole_batches(model: nn.Module, values: Tensor, pick: Callable[[Any], Any]) -> bool:
    """Whether plain forward passes must run whole batches. If the model itself is the reason, a warning says why."""
    if is_sharded(model):
        return True  # each pass takes all ranks, which have different parts left
    reason = partial_batch_difference(model, values, pick)
    if reason:
        rank_zero_warn(
            f"The model is not run on parts of a batch ({reason}), but on whole batches, which takes longer."
        )
    return bool(reason)


def partial_batch_difference(model: nn.Module, values: Tensor, pick: Callable[[Any], Any]) -> str:
    """Why the model cannot be run on a part of a batch: it fails, or returns other outputs; empty if it can."""
    half = len(values) // 2
    if half == 0:
        return ""
    with eager(), isolated(model, values.device), torch.no_grad():
        whole = tensor_of(pick(model(values.clone())))[:half]
        try:
            part = tensor_of(pick(model(values[:half].clone())))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if part.shape != whole.shape:
        return f"outputs of shape {tuple(part.shape)} for {half} samples"
    largest = float(whole.float().abs().max()) if whole.numel() else 0.0
    apart = float((part.float() - whole.float()).abs().max()) if whole.numel() else 0.0
    if apart > 16 * max(SAME_LOSS, torch.finfo(whole.dtype).eps) * largest:
        return "its outputs for a sample depend on the other samples of the batch"
    return ""


class ConsumedIteratorError(ValueError):
    """The step reads from an iterator, which each call consumes."""


def _consumed(step: Step) -> ConsumedIteratorError:
    found = ", ".join(f"self.{name} (a {kind})" for name, kind in iterators_of(step.module).items()) or "an iterator"
    return ConsumedIteratorError(
        f"{step.name} of {type(step.module).__name__} reads from {found}, which is consumed at each call. So the loss is not a function of "
        "the batch, and the step cannot be attacked. Let the trainer load the data instead: Trainer.fit(module, CombinedLoader({'labelled': "
        "..., 'unlabelled': ...})), and name the inputs to attack with inputs='labelled.0'."
    )


@contextlib.contextmanager
def _watching(
    module: nn.Module, model: nn.Module | None, calls: list[Any], heads: list[Any], inspection: StepInspection
) -> Iterator[None]:
    inside = [0]  # depth of nested calls: a model may call itself
    level = internal_pass_depth()  # to ignore the forward passes of an attack inside of the step

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        if internal_pass_depth() != level:
            return
        inside[0] += 1
        if inside[0] == 1:
            kept = [each.detach().clone() if isinstance(each, Tensor) else each for each in args]
            calls.append([kept, dict(kwargs), None])

    def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if internal_pass_depth() != level:
            return
        inside[0] -= 1
        if inside[0] == 0:
            calls[-1][2] = output

    def head(layer: nn.Module, args: Any, output: Any) -> None:
        if internal_pass_depth() == level:
            heads.append((layer, output))
        else:
            inspection.runs_attack = True

    handles = []
    if model is not None:
        handles += [attach_hook(model, enter, before=True, keywords=True), attach_hook(model, leave, keywords=True)]
    for each in module.modules():
        if isinstance(each, (nn.Linear, *CONVOLUTIONS)):
            handles.append(attach_hook(each, head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _difference(calls: list[Any], values: Tensor, model: nn.Module | None) -> str:
    """Why a plain forward pass over the values is a different computation; empty if it is the same."""
    name = "the module" if model is None else type(model).__name__
    if len(calls) != 1:
        return f"{name} was called {len(calls)} times in the step, but a plain forward pass is one call"
    args, kwargs, _ = calls[0]
    if kwargs or len(args) != 1:
        given = ", ".join([f"{len(args)} positional", *map(repr, kwargs)])
        return f"{name} was called with other arguments than the inputs alone ({given})"
    (received,) = args
    if not isinstance(received, Tensor):
        return f"{name} was called on a {type(received).__name__}, not on the batch's tensor"
    if received.shape != values.shape:
        return (
            f"{name} was called on inputs of shape {tuple(received.shape)}, but the batch holds {tuple(values.shape)}"
        )
    if not torch.equal(received, values.detach().to(received.dtype)):
        return f"{name} was called on other values than those of the batch: the step changes them first"
    return ""


def _classifier(
    calls: list[Any], heads: list[Any], labels: Any, loss: Tensor, pick: Callable[[Any], Any]
) -> tuple[Source | None, Callable[[Any], Any] | None, int]:
    """Where the logits of a classifier are: the model's outputs, the first suitable part of them, or the last linear layer's outputs.

    Returns:
        The source, what picks the logits from the model's outputs, and the number of rows of the logits.
    """
    if calls:
        outputs = pick(calls[0][2])
        if is_classification(outputs, labels, loss):
            return "model", None, len(tensor_of(outputs))
        keys = (
            list(outputs)
            if isinstance(outputs, Mapping)
            else range(len(outputs) if isinstance(outputs, (tuple, list)) else 0)
        )
        for key in keys:
            if isinstance(outputs[key], Tensor) and is_classification(outputs[key], labels, loss):
                return "model", operator.itemgetter(key), len(outputs[key])
    linear = [each for each in heads if isinstance(each[0], nn.Linear)] or heads
    if linear and is_classification(linear[-1][1], labels, loss):
        return "head", None, len(linear[-1][1])
    return None, None, 0
