"""PGD whose perturbation budget is shared by the samples of a batch: an attack on the distribution of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_wdefense._dtype import widest
from lightning_wdefense._ranks import ALONE, Ranks, rows_of
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.gradient.allocation import first_order_shares, within_budget
from lightning_wdefense.attacks.gradient.start import RandomStart, check_start, start
from lightning_wdefense.attacks.losses import AttackLoss, check_loss, outputs_as_losses
from lightning_wdefense.attacks.problem import Model, Problem
from lightning_wdefense.attacks.settings import check_counts
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.modules.outputs import float32_or_better
from lightning_wdefense.modules.parallel import lockstep


@dataclass(frozen=True)
class SharedBudgetPGD(Attack):
    """Projected gradient ascent with one budget for the whole batch (W-PGD): ``mean_i |x'_i - x_i|^p <= eps^p``.

    The adversary moves the *distribution* of the inputs by at most ``eps`` in the Wasserstein distance ``W_p``, with the threat model's
    norm as ground distance. The batch is its sample of the distribution. So a sample near the decision boundary costs little, and what
    it leaves can be spent on another one, which may move much farther than ``eps``. For that reason the attack is for training: the
    monitors, which report what is left in a ball around each sample, refuse it.

    Each step gives sample ``i`` the length ``step_size * (s_i / S)^(q - 1)`` along the steepest ascent, where ``s_i`` is the dual norm of
    its gradient, ``1/p + 1/q = 1`` and ``S = (mean_i s_i^q)^(1/q)``: the best allocation to first order. Then the lengths are brought
    back into the budget (:func:`~lightning_wdefense.attacks.gradient.allocation.within_budget`: soft thresholding for ``p = 1``, one
    factor for all above), and the samples into the bounds, which makes no displacement longer.

    Under torch.distributed the budget belongs to the samples of all ranks. All ranks must then call the attack together, also a rank for
    which ``samples=`` chooses none. With ``samples=`` the budget belongs to the samples that are attacked; the others do not count.

    Args:
        threat: the threat model (any norm but ``wasserstein``); ``eps`` is the radius of the Wasserstein ball, in data units.
        p: order of the Wasserstein distance, ``1 <= p < inf``. With 1 each step moves the samples with the largest slope alone, so
            the budget is spent on few samples, and ``steps`` limits on how many. A large ``p`` is close to :class:`PGD`.
        steps: number of gradient steps.
        step_size: length of a step in data units, in the mean of order ``p`` over the samples; ``None`` for ``2.5 * eps / steps``.
        loss: ``"ce"``, ``"margin"``, ``"kl"``, or a callable ``(outputs, labels) -> per-sample loss``.
        clip: largest value of a sample's loss that counts; ``None`` for no limit. A sample above it is moved no farther, so the
            budget goes to the others. With ``loss="margin"`` and a small value nothing is gained once a sample is misclassified, as for
            the loss that the paper recommends for evaluation.
        random_start: ``True`` for a uniform start in the ball of radius ``eps`` of each sample, ``"gaussian"`` for the start of
            TRADES, ``False`` for a start at the clean inputs, where ``loss="kl"`` has no gradient.
        all_ranks: whether the samples of all ranks share the budget; ``False`` gives each rank a budget of its own.
        seed: seeds the noise of calls without a generator.

    Raises:
        ValueError: for the norm ``wasserstein``, an unknown loss, ``p`` below 1 or infinite, ``steps`` below 1, a step size that is not
            positive, or a ``clip`` that is not finite; at the call, for a single sample over all ranks.

    References:
        Bai, He, Jiang, Obloj, "Wasserstein distributional robustness of neural networks", NeurIPS 2023 (arXiv 2306.09844).

    Example:
        >>> import torch
        >>> threat = ThreatModel(norm="l2", eps=1.0, bounds=None)
        >>> attack = SharedBudgetPGD(threat, p=2, loss=lambda outputs, _: outputs, random_start=False)
        >>> slopes = torch.tensor([3.0, 4.0])  # of two samples with linear losses
        >>> attack(lambda inputs: slopes * inputs[:, 0], torch.zeros(2, 1)).flatten()
        tensor([0.8485, 1.1314])
    """

    name: ClassVar[str] = "shared-budget-pgd"

    threat: ThreatModel
    p: float = 2.0
    steps: int = 10
    step_size: float | None = None
    loss: AttackLoss = "ce"
    clip: float | None = None
    random_start: RandomStart = True
    all_ranks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        _ = self.threat.ball
        if not 1 <= self.p < math.inf:
            raise ValueError(
                f"p must be at least 1 and finite, got {self.p}. Without a shared budget (p = inf) the attack is PGD."
            )
        check_counts(self, "steps")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive (data units), got {self.step_size}.")
        if self.clip is not None and not math.isfinite(self.clip):
            raise ValueError(f"clip must be finite, or None for no limit, got {self.clip}.")
        check_start(self.random_start, self.loss)

    @property
    def bounded(self) -> bool:
        """Whether the results stay inside the threat model's ball: no, only their mean does."""
        return False

    def of_losses(self) -> Attack | None:
        """The same attack for a model that returns its losses; ``None`` with ``clip``, which counts the loss of each sample."""
        possible = self.loss in ("ce", "margin") and self.clip is None
        return replace(self, loss=outputs_as_losses) if possible else None

    def ranks_for(self, model: Model) -> Ranks:
        """All ranks, because they share the budget."""
        return Ranks.current() if self.all_ranks else lockstep(model)

    def take_part(self, inputs: Tensor) -> None:
        """Share the budget of the other ranks without a sample of one's own."""
        ranks = Ranks.current() if self.all_ranks else ALONE
        if ranks.size == 1:
            return
        ranks.any(False, inputs.device)  # a call asks first whether any rank attacks
        if self.threat.eps > 0:
            nothing = float32_or_better(inputs).new_zeros(0)
            lengths = _Samples(ranks, nothing)
            for _ in range(self.steps):
                lengths.together(nothing, lambda values: values)
                lengths.together(nothing, lambda values: values)

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        clean, threat, ball = problem.data, self.threat, self.threat.ball
        if threat.eps == 0:
            return clean
        samples = _Samples(problem.ranks if self.all_ranks else ALONE, clean)
        if self.loss == "kl":
            problem = problem.with_clean_outputs()
        size = 2.5 * threat.eps / self.steps if self.step_size is None else self.step_size
        data = start(problem, self.random_start)
        for index in range(self.steps):
            gradient = self._gradient(problem, data, check=index == 0)
            shares = samples.together(ball.dual(gradient), lambda all_: first_order_shares(all_, self.p))
            moved = problem.step(gradient, data, size * shares).add_(data)
            lengths = samples.together(ball.length(moved - clean), lambda all_: within_budget(all_, threat.eps, self.p))
            data = threat.project_(moved, clean, problem.box, lengths)
        return data

    def _gradient(self, problem: Problem, data: Tensor, *, check: bool) -> Tensor:
        if self.clip is None:
            return problem.gradient(data, self.loss, check=check)
        point = data.detach().requires_grad_()
        values = problem.loss(problem.forward(point), self.loss, check=check).clamp_max(self.clip)
        return problem.differentiate(values, point, torch.ones_like(values))


class _Samples:
    """The samples that share a budget: those of this rank, among those of all ranks.

    Args:
        ranks: the ranks that share it.
        own: this rank's samples, ``(N, ...)``.

    Raises:
        ValueError: if there is a single sample.
    """

    def __init__(self, ranks: Ranks, own: Tensor) -> None:
        self._ranks, self._sizes = ranks, ranks.row_counts(own)
        if sum(self._sizes) == 1:
            raise ValueError(
                "SharedBudgetPGD shares a budget among samples, but got a shared budget with a batch of one. Use PGD, whose budget is of "
                "each sample, or larger batches; if only the last batch is so small, DataLoader(..., drop_last=True)."
            )

    def together(self, values: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """This rank's part of what ``compute`` makes of a value ``(N,)`` of each sample of all ranks, in float64."""
        everyone = self._ranks.gather(values, self._sizes)
        return compute(everyone.to(widest(everyone.device)))[rows_of(self._ranks.rank, self._sizes)].to(values.dtype)
