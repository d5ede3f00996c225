"""One batch under attack: the model, the data and their limits, in data units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_wdefense._ranks import ALONE, Ranks
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.attacks.losses import AttackLoss, cross_entropy, kl_divergence, margin
from lightning_wdefense.attacks.norms import Radius, l1_step, per_sample
from lightning_wdefense.attacks.partial_batches import PartialBatchModel
from lightning_wdefense.attacks.threat import Box, ThreatModel
from lightning_wdefense.modules.autograd import gradients
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.graphs import Replays
from lightning_wdefense.modules.outputs import check_logits, logits_of, predictions
from lightning_wdefense.modules.parallel import lockstep, out_of_step
from lightning_wdefense.modules.state.isolation import isolated

Model = Callable[[Tensor], Any]

_NO_GRADIENT = (
    "The model's outputs do not depend differentiably on its inputs, so a gradient attack cannot work. Look in forward for a "
    "detach(), a no_grad() block or an argmax."
)


@dataclass(frozen=True)
class Problem:
    """One batch under attack, in data units: the argument of :meth:`Attack.perturb`.

    Attributes:
        model: the user's model; call it through :meth:`forward`.
        run: the model as the :class:`Execution` runs it, also on a part of the batch; takes inputs in model units.
        data: clean inputs ``(N, ...)`` in data units, float32 or float64.
        labels: the labels as given.
        box: element-wise limits of the adversarial inputs, in data units.
        threat: the threat model.
        generator: random generator for all noise.
        dtype: the dtype of the model's inputs.
        clean_outputs: the model's outputs on the clean inputs, if the loss needs them.
        replays: computes gradients on the whole batch with CUDA graphs; ``None`` for no graphs.
        ranks: the ranks that must run the model equally often.
    """

    model: Model
    run: Model
    data: Tensor
    labels: Any
    box: Box
    threat: ThreatModel
    generator: torch.Generator
    dtype: torch.dtype
    clean_outputs: Any = None
    replays: Replays | None = None
    ranks: Ranks = ALONE

    def anywhere(self, condition: bool) -> bool:
        """Whether a condition holds on any of the ranks: whether all go on with an attack, a sample of it being left on one of them."""
        return self.ranks.any(condition, self.data.device)

    def forward(self, data: Tensor) -> Any:
        """The model's outputs for inputs in data units. The model gets a copy, because it may work in place."""
        inputs = self.threat.to_model(data)
        return self.run(inputs.to(self.dtype, copy=inputs is data))

    def to_inputs(self, data: Tensor) -> Tensor:
        """The box's nearest point to ``data`` (data units) as the model's inputs: in model units, in their dtype, detached."""
        return self.threat.to_model(self.box.clamp(data)).to(self.dtype).detach()

    def outputs(self, data: Tensor) -> Any:
        """:meth:`forward` without a graph."""
        with torch.no_grad():
            return self.forward(data)

    def select(self, index: Tensor) -> Problem:
        """The same problem for some of the samples, by a boolean mask or indices."""
        return replace(
            self,
            data=self.data[index],
            labels=apply_to_collection(self.labels, Tensor, lambda label: label[index]),
            box=self.box.select(index),
            clean_outputs=self.clean_outputs[index] if isinstance(self.clean_outputs, Tensor) else self.clean_outputs,
            replays=None,
        )

    def project(self, data: Tensor) -> Tensor:
        """Project ``data`` (data units) into the ball around the clean inputs, and into the box."""
        return self.project_(data.clone())

    def project_(self, data: Tensor) -> Tensor:
        """:meth:`project`, which may work in the memory of ``data``."""
        if self._limits is not None:
            return self._limits.clamp_(data)
        return self.threat.project_(data, self.data, self.box)

    def random_point(self, radius: float) -> Tensor:
        """Uniform noise in the ball of this radius (data units) around the clean inputs, clamped into the box."""
        return self.box.clamp(self.data + self.threat.ball.uniform(self.data, radius, self.generator))

    def step(self, gradient: Tensor, data: Tensor, length: Radius) -> Tensor:
        """A step of steepest ascent from ``data``, of this length (data units); may overwrite the gradient.

        In L1, where few coordinates move, those are left out that the box does not let move.
        """
        if self.threat.norm != "l1":
            scale = per_sample(length, data) if isinstance(length, Tensor) else length
            return self.threat.ball.steepest(gradient).mul_(scale)
        if self.box.low is None or self.box.high is None:
            return l1_step(gradient, length)
        return l1_step(gradient, length, self.box.low - data, self.box.high - data)

    @cached_property
    def _limits(self) -> Box | None:
        # In L-infinity the ball is a box as well, so that a projection into both is a single clamp.
        return self.box.around(self.data, self.threat.eps) if self.threat.norm == "linf" else None

    def with_clean_outputs(self) -> Problem:
        """The same problem with ``clean_outputs`` filled in, at the cost of one forward pass."""
        return replace(self, clean_outputs=logits_of(self.outputs(self.data)))

    def checked_outputs(self, loss: AttackLoss) -> Any:
        """The model's outputs on the clean inputs, checked by :meth:`check`, for attacks that do not call :meth:`gradient`."""
        outputs = self.forward(self.data.detach().requires_grad_())
        self.check(outputs, loss)
        return outputs

    def check(self, outputs: Any, loss: AttackLoss) -> None:
        """Refuse outputs and labels whose values do not fit the loss.

        The check synchronises with the device, so an attack does it once.

        Args:
            outputs: the model's outputs, with their autograd graph if there is one.
            loss: the loss to maximise; for a callable nothing is checked.

        Raises:
            TypeError: if the outputs are not logits.
            ValueError: if the outputs are probabilities, or the labels are not classes of the outputs.
        """
        if not callable(loss):
            check_logits(outputs)
            if loss != "kl":
                class_labels(self.labels, outputs, check_values=True)

    def loss(self, outputs: Any, loss: AttackLoss, *, check: bool = False) -> Tensor:
        """Per-sample loss ``(N,)`` of these outputs, which the attack maximises.

        Args:
            outputs: the model's outputs.
            loss: the loss to maximise.
            check: whether to :meth:`check` the values of outputs and labels first.

        Raises:
            ValueError: if a callable loss does not return one value per sample; also what :meth:`check` raises.
        """
        if check:
            self.check(outputs, loss)
        if loss == "kl":
            return kl_divergence(outputs, self.clean_outputs)
        if loss in ("ce", "margin"):
            labels = class_labels(self.labels, outputs)
            return cross_entropy(outputs, labels) if loss == "ce" else margin(outputs, labels)
        values = loss(outputs, self.labels)  # type: ignore[operator]
        if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != len(self.data):
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"loss= must return one loss per sample, shape ({len(self.data)},) here, got {shape}.")
        return values.flatten(1).sum(1) if values.ndim > 1 else values

    def gradient(self, data: Tensor, loss: AttackLoss, *, check: bool = False) -> Tensor:
        """Gradient of the summed loss with respect to the inputs, in data units; NaN becomes zero.

        Args:
            data: the point at which the gradient is taken, in data units.
            loss: the loss to maximise.
            check: as in :meth:`loss`.

        Returns:
            The gradient, in the shape of ``data``; a new tensor that the caller may overwrite.
        """
        given = self.clean_outputs if loss == "kl" else self.labels
        # A graph cannot synchronise with the device, as checks and float16 scaling do, and the tensors that a callable reads are unknown.
        if self.replays is None or check or callable(loss) or not isinstance(given, Tensor) or len(self._scales()) > 1:
            return self.outputs_and_gradient(data, loss, check=check)[1]
        name = loss, self.dtype, self.threat.mean, self.threat.std
        return self.replays(name, partial(self._gradient_given, loss), data, given)

    def _gradient_given(self, loss: AttackLoss, data: Tensor, given: Tensor) -> Tensor:
        """:meth:`gradient` with other labels, or other clean outputs, than the problem's own."""
        other = replace(self, clean_outputs=given) if loss == "kl" else replace(self, labels=given)
        return other.outputs_and_gradient(data, loss)[1]

    def outputs_and_gradient(self, data: Tensor, loss: AttackLoss, *, check: bool = False) -> tuple[Any, Tensor]:
        """The model's outputs and the :meth:`gradient`, from one forward and backward pass."""
        point = data.detach().requires_grad_()
        outputs = self.forward(point)
        values = self.loss(outputs, loss, check=check)
        return outputs, self.differentiate(values, point, torch.ones_like(values))

    def differentiate(self, values: Tensor, point: Tensor, weights: Tensor, *, keep_graph: bool = False) -> Tensor:
        """Gradient of the weighted sum of ``values`` with respect to ``point``; NaN becomes zero.

        Args:
            values: the tensor to differentiate.
            point: the inputs, in data units.
            weights: weights of the values, in their shape.
            keep_graph: keep the autograd graph for another call. The graphs of compiled modules cannot be kept.

        Raises:
            ValueError: if ``values`` do not depend differentiably on ``point``.
            RuntimeError: if the model checkpoints its activations with ``use_reentrant=True``.
        """
        if not values.requires_grad:
            raise ValueError(_NO_GRADIENT)
        for scale in self._scales():
            keep = keep_graph or scale != 1
            scaled = weights if scale == 1 else weights * scale
            (gradient,) = gradients(values, point, scaled, retain_graph=keep)
            if gradient is None:
                raise ValueError(_NO_GRADIENT)
            if scale == 1 or not self.anywhere(not bool(torch.isfinite(gradient).all())):
                break
        # Always a copy: the tensor that autograd returns may be shared, or overlap itself in memory.
        return torch.nan_to_num(gradient if scale == 1 else gradient / scale, nan=0.0, posinf=0.0, neginf=0.0)

    def _scales(self) -> tuple[int, ...]:
        # float16 gradients underflow: scale the loss up, and less if the gradient then overflows.
        device = self.data.device.type
        half = self.dtype == torch.float16 or (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        )
        return (4096, 64, 1) if half else (1,)

    def fooled(self, outputs: Any) -> Tensor:
        """Which samples are misclassified by these outputs, a boolean mask ``(N,)``; for dense labels, in at least one element."""
        labels = hard_labels(class_labels(self.labels, outputs))
        wrong = (predictions(outputs) != labels) & not_ignored(labels)
        return wrong.flatten(1).any(1) if wrong.ndim > 1 else wrong


@contextmanager
def posed(
    attack: Any,
    model: Model,
    inputs: Tensor,
    labels: Any,
    generator: torch.Generator | None = None,
    execution: Execution | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Problem]:
    """The problem that an attack solves for a batch, while the model is isolated: afterwards it is as it was.

    Args:
        attack: has a ``threat``, a ``seed``, and ``runs_in_lockstep``.
        model: the user's model.
        inputs: ``(N, ...)`` floating point, in model units.
        labels: labels of the batch.
        generator: random generator for all noise; ``None`` for one seeded with the attack's ``seed``.
        execution: how the model is run; ``None`` for unchanged.
        ranks: the ranks that attack together; ``None`` for all if the model is sharded, otherwise this one alone.

    Raises:
        TypeError: if the inputs are not floating point, or ``execution`` compiles something that is not a module.
        ValueError: if the inputs do not fit the threat model, or the device does not support autocast.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"The inputs must be a tensor, got {type(inputs).__name__}. Say where the inputs are in the batch with inputs=."
        )
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError(f"The inputs must be a batch with at least one sample, got shape {tuple(inputs.shape)}.")
    if inputs.numel() == 0:
        raise ValueError(
            f"The inputs have an empty dimension, so there is nothing to attack: shape {tuple(inputs.shape)}."
        )
    execution, ranks = execution or Execution(), lockstep(model) if ranks is None else ranks
    if ranks.size > 1 and not attack.runs_in_lockstep:
        raise ValueError(out_of_step(attack))
    with isolated(model, inputs.device), execution.prepared(model, inputs.device) as run:
        clean = inputs.detach().clone()
        labels = apply_to_collection(labels, Tensor, lambda label: label.detach().clone())
        # Half precision cannot represent small steps: the attack iterates in float32, and the model gets its own dtype.
        data, box = attack.threat.read(execution.lay_out(clean))
        whole = execution.whole or ranks.size > 1 or not getattr(model, "accepts_partial_batches", True)
        yield Problem(
            model,
            PartialBatchModel(run, clean, whole=whole),
            data,
            labels,
            box,
            attack.threat,
            generator or torch.Generator(inputs.device).manual_seed(attack.seed),
            inputs.dtype,
            replays=execution.replays(model, inputs.device),
            ranks=ranks,
        )
