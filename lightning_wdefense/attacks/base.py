"""The base class of all attacks, which isolates the model, converts units and enforces the bounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lightning_wdefense._ranks import Ranks
from lightning_wdefense.attacks.problem import Model, Problem, posed
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.parallel import lockstep

AttackT = TypeVar("AttackT", bound="Attack")


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
        with posed(self, model, inputs, labels, generator, execution, self.ranks_for(model)) as problem:
            chosen = None if samples is None else _indices(samples, len(inputs)).to(inputs.device)
            clean = inputs.detach().clone()
            if (self.threat.eps == 0 and self.bounded) or not problem.anywhere(chosen is None or len(chosen) > 0):
                return clean
            if chosen is not None:
                problem = problem.select(chosen)
            clean[slice(None) if chosen is None else chosen] = problem.to_inputs(self.perturb(problem))
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
