"""The base class of all attacks, which isolates the model, converts units and enforces the bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_wdefense._ranks import ALONE, Ranks
from lightning_wdefense.attacks.labels import class_labels, hard_labels, not_ignored
from lightning_wdefense.attacks.losses import AttackLoss, cross_entropy, kl_divergence, margin
from lightning_wdefense.attacks.partial_batches import PartialBatchModel
from lightning_wdefense.attacks.threat import Box, ThreatModel, check_threat
from lightning_wdefense.modules.autograd import gradients
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.graphs import Replays
from lightning_wdefense.modules.outputs import check_logits, logits_of, predictions
from lightning_wdefense.modules.parallel import lockstep, out_of_step
from lightning_wdefense.modules.state.isolation import isolated

Model = Callable[[Tensor], Any]
AttackT = TypeVar("AttackT", bound="Attack")

_NO_GRADIENT = (
    "The model's outputs do not depend differentiably on its inputs, so a gradient attack cannot work. Look in forward for a "
    "detach(), a no_grad() block or an argmax."
)


class Attack(ABC):
    """Computes adversarial inputs: ``attack(model, inputs, labels) -> adversarial inputs``.

    An attack holds configuration only. The model is an argument of the call, so an attack can be pickled, named in YAML
    and shared. Every attack keeps these promises:

    - The mode of each submodule, parameter gradients, buffers and the global random state are restored, also after an
      exception.
    - It works under ``no_grad``, ``inference_mode`` and autocast.
    - The results stay inside the bounds. If ``bounded`` is true, they also stay inside the ball of radius ``eps``.

    A subclass implements :meth:`perturb`, in data units.

    Attributes:
        threat: the threat model.
        name: the attack's short name, as in logs and in :func:`get_attack`.
        bounded: whether the results stay inside the threat model's ball. An attack that is not bounded is for training
            only.
        seed: seeds the noise of a call without a generator, so that the same call gives the same result.

    Example:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Brighter(Attack):
        ...     threat: ThreatModel
        ...     seed: int = 0
        ...     name = "brighter"
        ...
        ...     def perturb(self, problem: Problem) -> Tensor:
        ...         return problem.project(problem.data + self.threat.eps)
        >>> attack = Brighter(ThreatModel(eps=0.25))
        >>> attack(torch.nn.Linear(2, 3), torch.tensor([[0.5, 1.0]]), torch.tensor([0]))
        tensor([[0.7500, 1.0000]])
    """

    if TYPE_CHECKING:  # jsonargparse would read these in the modules of subclasses, where the names need not be known
        threat: ThreatModel
        seed: int
        name: ClassVar[str]
    runs_in_lockstep = True
    """Whether all ranks run a sharded model equally often."""

    def __post_init__(self) -> None:
        check_threat(self.threat, type(self).__name__)

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat model's ball."""
        return True

    def of_losses(self) -> Attack | None:
        """The same attack for a model that returns losses ``(N,)`` instead of outputs; ``None`` if the attack needs outputs."""
        return None

    def ranks_for(self, model: Model) -> Ranks:
        """The ranks that must call the attack together: all for a sharded model, otherwise this one alone."""
        return lockstep(model)

    def take_part(self, inputs: Tensor) -> None:
        """Called in training, instead of the attack, on a rank that has no samples, with its empty ``inputs`` ``(0, ...)``.

        An attack that communicates with the other ranks does so here as often as in a call.
        """
        del inputs

    @abstractmethod
    def perturb(self, problem: Problem) -> Tensor:
        """Compute adversarial inputs in data units.

        The caller isolates the model before. Afterwards it clamps the result into the bounds and converts it to model
        units.

        Args:
            problem: the batch and the model.
        """

    def with_eps(self: AttackT, eps: float) -> AttackT:
        """The same attack with another perturbation budget ``eps`` (data units); a given step size is scaled in proportion."""
        changes: dict[str, Any] = {"threat": self.threat.with_eps(eps)}
        step_size = getattr(self, "step_size", None)
        if step_size is not None:
            changes["step_size"] = step_size * self.threat.ratio_to(eps)
        return replace(self, **changes)  # type: ignore[type-var]

    def __call__(
        self,
        model: Model,
        inputs: Tensor,
        labels: Any = None,
        *,
        generator: torch.Generator | None = None,
        samples: Tensor | None = None,
        execution: Execution | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: an ``nn.Module``, or any callable from inputs to outputs. Modes and buffers are restored for a module
                and for a method of a module.
            inputs: ``(N, ...)`` floating point, of any shape, in model units.
            labels: the ground truth labels in the form that the loss takes. The named losses take class indices
                ``(N,)`` or soft labels ``(N, K)``.
            generator: random generator for all noise; ``None`` for one seeded with ``seed``.
            samples: the samples to attack, as indices or a boolean mask ``(N,)``; the other samples are returned clean.
                All samples are checked against the bounds.
            execution: how the model is run (precision, memory layout, compiled or as a CUDA graph); ``None`` for
                unchanged.

        Returns:
            Adversarial inputs in model units, with the shape, dtype and device of ``inputs``, detached.

        Raises:
            TypeError: if the inputs are not floating point, the outputs are not logits, or ``execution`` compiles
                something that is not a module.
            ValueError: if the inputs do not fit the threat model, the labels do not fit the outputs, ``samples`` does
                not fit the inputs, or the device does not support autocast.
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
        samples = None if samples is None else _indices(samples, len(inputs)).to(inputs.device)
        execution, ranks = execution or Execution(), self.ranks_for(model)
        if ranks.size > 1 and not self.runs_in_lockstep:
            raise ValueError(out_of_step(self))
        with isolated(model, inputs.device), execution.prepared(model, inputs.device) as run:
            clean = inputs.detach().clone()
            labels = apply_to_collection(labels, Tensor, lambda label: label.detach().clone())
            # Half precision cannot represent small steps: the attack iterates in float32, and the model gets its own dtype.
            data, box = self.threat.read(execution.lay_out(clean))
            if (self.threat.eps == 0 and self.bounded) or not ranks.any(samples is None or len(samples) > 0):
                return clean
            generator = generator or torch.Generator(inputs.device).manual_seed(self.seed)
            problem = Problem(
                model,
                PartialBatchModel(
                    run,
                    clean,
                    whole=execution.whole or ranks.size > 1 or not getattr(model, "accepts_partial_batches", True),
                ),
                data,
                labels,
                box,
                self.threat,
                generator,
                inputs.dtype,
                replays=execution.replays(model, inputs.device),
                ranks=ranks,
            )
            if samples is not None:
                problem = problem.select(samples)
            adversarial = self.threat.to_model(problem.box.clamp(self.perturb(problem))).to(inputs.dtype).detach()
            clean[slice(None) if samples is None else samples] = adversarial
            return clean


def _indices(samples: Tensor, size: int) -> Tensor:
    """Indices of the samples that a boolean mask ``(N,)`` or indices choose, for ``N = size``."""
    samples = torch.as_tensor(samples)
    if samples.dtype == torch.bool:
        if samples.shape == (size,):
            return samples.nonzero().squeeze(1)
    elif samples.ndim == 1 and not samples.is_floating_point():
        samples = samples.long()
        if not bool(((samples < -size) | (samples >= size)).any()):
            return samples
    raise ValueError(
        f"samples= must be a boolean mask of shape ({size},) or indices in 0..{size - 1} for {size} inputs, got {samples.dtype} of "
        f"shape {tuple(samples.shape)}{f', from {samples.min()} to {samples.max()}' * (samples.numel() > 0)}."
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
        return self.box.clamp_(self.threat.ball.project(data.sub_(self.data), self.threat.eps).add_(self.data))

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
