"""The base class of minimum-norm attacks, which return the smallest perturbation that they find for each sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_wdefense._names import unknown_name
from lightning_wdefense.attacks.norms import per_sample
from lightning_wdefense.attacks.problem import Model, Problem, posed
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.modules.execution import Execution
from lightning_wdefense.modules.outputs import predictions

MinimalAttackT = TypeVar("MinimalAttackT", bound="MinimalAttack")


class MinimalPerturbation(NamedTuple):
    """The result of a minimum-norm attack.

    A distance is an upper bound on the sample's distance to the decision boundary: a better attack may find a smaller one.

    Attributes:
        inputs: adversarial inputs ``(N, ...)`` in model units, in the dtype of the inputs; the clean input where the distance is 0 or
            infinite.
        distances: distance of each adversarial input from the clean one, ``(N,)``, in data units and in the norm of the threat model;
            0 where the clean input is misclassified, infinite where nothing was found.

    Example:
        >>> MinimalPerturbation._fields
        ('inputs', 'distances')
    """

    inputs: Tensor
    distances: Tensor


class MinimalAttack(ABC):
    """Finds the smallest perturbation that fools a classifier: ``attack(model, inputs, labels) -> MinimalPerturbation``.

    Where an :class:`~lightning_wdefense.attacks.Attack` asks whether a sample falls within eps, a minimum-norm attack asks at which
    eps it falls. One run gives the robust accuracy at every eps. The threat model's eps is not used.

    A minimum-norm attack keeps the promises of :class:`~lightning_wdefense.attacks.Attack`: the model is left as it was, it works
    under ``no_grad``, ``inference_mode`` and autocast, and the results stay inside the bounds. The models are classifiers with one
    label for each sample.

    A subclass implements :meth:`search`, in data units.

    Attributes:
        threat: the threat model.
        name: the attack's short name, as in logs and in :func:`get_minimal_attack`.
        norms: the norms in which the attack can search.
        seed: seeds the noise of a call without a generator.
    """

    if TYPE_CHECKING:  # jsonargparse would read these in the modules of subclasses, where the names need not be known
        threat: ThreatModel
        seed: int
        name: ClassVar[str]
        norms: ClassVar[tuple[str, ...]]
    runs_in_lockstep = True
    """Whether all ranks run a sharded model equally often."""

    def __post_init__(self) -> None:
        check_threat(self.threat, type(self).__name__)
        if self.threat.norm not in self.norms:
            raise ValueError(
                f"{unknown_name('norm', self.threat.norm, self.norms)} {type(self).__name__} finds minimal perturbations in these norms only; "
                "for others use MinimalEps with an attack of that norm."
            )

    def with_threat(self: MinimalAttackT, threat: ThreatModel) -> MinimalAttackT:
        """The same attack for another threat model."""
        return self if threat == self.threat else replace(self, threat=threat)  # type: ignore[type-var]

    @abstractmethod
    def search(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Search for the closest adversarial inputs of samples that are classified correctly; all in data units.

        Args:
            problem: the batch and the model.

        Returns:
            Adversarial inputs ``(N, ...)`` inside of the bounds, and their distances ``(N,)``: infinite where nothing was found.
        """

    def __call__(
        self,
        model: Model,
        inputs: Tensor,
        labels: Any,
        *,
        generator: torch.Generator | None = None,
        execution: Execution | None = None,
    ) -> MinimalPerturbation:
        """Search for the closest adversarial input of each sample.

        Args:
            model: an ``nn.Module`` or any callable from inputs to logits.
            inputs: ``(N, ...)`` floating point, of any shape, in model units.
            labels: class indices ``(N,)`` or soft labels ``(N, K)``.
            generator: random generator for all noise; ``None`` for one seeded with ``seed``.
            execution: how the model is run; ``None`` for unchanged.

        Returns:
            Adversarial inputs in model units, and their distances in data units.

        Raises:
            TypeError: if the inputs are not floating point, or the outputs are not logits.
            ValueError: if the inputs do not fit the threat model, the labels do not fit the outputs, or there is more than one label
                for each sample.
        """
        with posed(self, model, inputs, labels, generator, execution) as problem:
            outputs = problem.checked_outputs("margin")
            if (predicted := predictions(outputs)).ndim > 1:
                raise ValueError(
                    f"A distance needs one label for each sample, but the model predicts classes of shape {tuple(predicted.shape)}: for "
                    "masks, attack at a fixed eps with PGD."
                )
            with torch.no_grad():
                right = (~problem.fooled(outputs)).nonzero().squeeze(1)
            found = inputs.detach().clone()
            distances = problem.data.new_zeros(len(found))
            if problem.anywhere(len(right) > 0):
                part = problem.select(right)
                data, lengths = self.search(part)
                reached = lengths.isfinite()
                found[right[reached]] = part.to_inputs(data)[reached]
                distances[right] = lengths.to(distances.dtype)
            return MinimalPerturbation(found, distances)


class Closest:
    """The closest adversarial inputs so far."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.data = problem.data.clone()
        self.distances = problem.data.new_full((len(problem.data),), torch.inf)

    def keep(self, data: Tensor, fooled: Tensor, lengths: Tensor | None = None, index: Tensor | None = None) -> None:
        """Compare other inputs, of which some fool the model, with the closest so far, and keep the closer ones.

        Args:
            data: ``(M, ...)`` in data units.
            fooled: which of them fool the model, ``(M,)``.
            lengths: their distances ``(M,)``; ``None`` for those in the threat model's norm.
            index: the samples to which they belong, ``(M,)``; ``None`` for all.
        """
        chosen: Any = slice(None) if index is None else index
        if lengths is None:
            lengths = self.problem.threat.ball.length(data - self.problem.data[chosen])
        closer = fooled & (lengths < self.distances[chosen])
        self.data[chosen] = torch.where(per_sample(closer, data), data, self.data[chosen])
        self.distances[chosen] = torch.where(closer, lengths, self.distances[chosen])

    def tighten(self, passes: int) -> None:
        """Bisect between the clean and the adversarial inputs, with so many forward passes."""
        self._bisect(self.data.clone(), passes)

    def straighten(self, passes: int) -> None:
        """Try the way from the clean inputs that is steepest at the adversarial ones, as far, and bisect along it.

        It is the shortest way to a flat boundary. The cost is a backward pass and so many forward passes.
        """
        problem = self.problem
        gradient, reached = problem.gradient(self.data, "margin"), self.distances.nan_to_num(posinf=0.0)
        self._bisect(problem.box.clamp(problem.step(gradient, problem.data, reached).add_(problem.data)), passes)

    def _bisect(self, far: Tensor, passes: int) -> None:
        """Bisect between the clean inputs and others, and keep what fools the model."""
        problem = self.problem
        low, high = torch.zeros_like(self.distances), torch.ones_like(self.distances)
        for _ in range(passes):
            middle = (low + high) / 2
            # The box contains both ends.
            data = problem.box.clamp(torch.lerp(problem.data, far, per_sample(middle, far)))
            fooled = problem.fooled(problem.outputs(data))
            self.keep(data, fooled)
            low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
