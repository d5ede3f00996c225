"""A first look at a module's step: what it computes of a batch, and whether a plain forward pass is the same."""

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

from lightning_wdefense.attacks.steps.classification import SAME_LOSS, is_classification
from lightning_wdefense.attacks.steps.sites import PerturbationSite
from lightning_wdefense.modules.attachments import attach_hook
from lightning_wdefense.modules.autograd import gradients
from lightning_wdefense.modules.outputs import tensor_of
from lightning_wdefense.modules.recording import CONVOLUTIONS
from lightning_wdefense.modules.state.isolation import eager, internal_pass_depth, isolated
from lightning_wdefense.modules.state.step_state import iterators_of
from lightning_wdefense.modules.steps import Noise, Step

Source = Literal["model", "head"]


@dataclass
class StepInspection:
    """What was seen of a step.

    Attributes:
        noise: how the step is to be run: in eval mode, or, where it returns no loss there, in its own modes without noise.
        loss: of the clean batch; ``None`` where the step returns none.
        differentiable: whether the loss has a gradient in the adversary's values.
        plain: whether the model ran once, on these values alone, so that a plain forward pass computes the same outputs.
        outputs: where a classifier's outputs are found: what the model returned, or the last linear layer; ``None`` where
            neither is a classifier's.
        pick: finds the logits in the model's outputs, where they are a part of them.
        by_sample: whether there is one row of those logits for each of the values.
        model_calls: how often the model ran.
        tensor: whether it returned one tensor.
        head_ran: whether a linear layer ran.
        runs_attack: whether the step attacks the model by itself.
        reason: in words, why a plain forward pass is not the same computation.
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
    """Run the step twice on a clean batch, without a trace, and see what it does.

    Args:
        step: the step.
        site: the batch, and what the adversary moves in it.
        labels: of the batch; ``None`` where there are none.
        model: whose outputs are watched.
        pick: finds the outputs in what the model returns.

    Raises:
        ValueError: if the step draws on an iterator, which nobody can put back.
        Exception: whatever the step raises.
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
            f"{step.name} of {type(step.module).__name__} gave two losses for one batch, {inspection.loss:.6g} and "
            f"{'none' if again is None else format(float(again.detach()), '.6g')}: it draws on something that cannot be put back (a random "
            "source of its own, state outside of the module), so the adversary climbs a hill that moves.",
            stacklevel=2,
        )
    return inspection


def partial_batch_difference(model: nn.Module, values: Tensor, pick: Callable[[Any], Any]) -> str:
    """Why a part of a batch is not run as in the whole: the model fails on it, or its outputs are others; empty where they are the same."""
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
        return "its outputs for a sample depend on the others of the batch"
    return ""


class ConsumedIteratorError(ValueError):
    """The step draws on something that is gone after a call."""


def _consumed(step: Step) -> ConsumedIteratorError:
    found = ", ".join(f"self.{name} (a {kind})" for name, kind in iterators_of(step.module).items()) or "an iterator"
    return ConsumedIteratorError(
        f"{step.name} of {type(step.module).__name__} draws on {found}, which is consumed at each call, so that the step is no function of "
        "its batch and cannot be attacked through. Let the trainer draw the data instead: Trainer.fit(module, CombinedLoader({'labelled': "
        "..., 'unlabelled': ...})), and name what is attacked with inputs='labelled.0'."
    )


@contextlib.contextmanager
def _watching(
    module: nn.Module, model: nn.Module | None, calls: list[Any], heads: list[Any], inspection: StepInspection
) -> Iterator[None]:
    inside = [0]  # a model may call itself
    level = internal_pass_depth()  # an attack inside of the step runs the model for purposes of its own

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
    """Why a plain forward pass over the values is another computation; empty where it is the same."""
    name = "the module" if model is None else type(model).__name__
    if len(calls) != 1:
        return f"{name} was called {len(calls)} times in the step, where a plain forward pass is one call"
    args, kwargs, _ = calls[0]
    if kwargs or len(args) != 1:
        given = ", ".join([f"{len(args)} positional", *map(repr, kwargs)])
        return f"{name} was called with other arguments beside the inputs ({given})"
    (received,) = args
    if not isinstance(received, Tensor):
        return f"{name} was called on a {type(received).__name__}, not on the batch's tensor"
    if received.shape != values.shape:
        return (
            f"{name} was called on inputs of shape {tuple(received.shape)}, but the batch holds {tuple(values.shape)}"
        )
    if not torch.equal(received, values.detach().to(received.dtype)):
        return f"{name} was called on other values than the batch's: the step changes them first"
    return ""


def _classifier(
    calls: list[Any], heads: list[Any], labels: Any, loss: Tensor, pick: Callable[[Any], Any]
) -> tuple[Source | None, Callable[[Any], Any] | None, int]:
    """Where a classifier's logits are: in what the model returned (the first part of it that they are), or in the last linear layer's."""
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
