"""The result of an evaluation: values with intervals, what happened to each sample, and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.evaluation.details.classes import ClassAccuracies, accuracies_by_class, confusion_of
from lightning_wdefense.evaluation.details.examples import Examples
from lightning_wdefense.evaluation.intervals import wilson_interval
from lightning_wdefense.evaluation.samples import NO_ATTACK, WITHOUT_ATTACK, Samples
from lightning_wdefense.metrics import AccuracyCurve
from lightning_wdefense.metrics._plot import get_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

CLEAN, ROBUST = "clean_acc", "robust_acc"


@dataclass(frozen=True, eq=False, repr=False)
class EvaluationResult:
    """What :func:`~lightning_wdefense.evaluate` measured. Printed, it is a short table.

    Attributes:
        values: the values by the names under which :class:`~lightning_wdefense.RobustnessMonitor` logs them, without the stage:
            ``clean_acc``, ``robust_acc``, ``robust_acc_{attack}``, ``attack_success``, with ``epsilons`` ``auac``, with
            ``distances`` ``auac``, ``median_distance`` (data units) and ``distributional_acc``, and ``transport_shift``. All but the
            distance and the last are shares in [0, 1].
        samples: what happened to each sample: columns ``(N,)`` on the CPU, in the order of the loader, see below.
        threat: the threat model.
        attacks: names of the attacks, in the order in which they ran.
        curve: with ``epsilons`` or ``distances``, accuracy by eps, on the CPU.
        examples: with ``examples``, the least and the most robust samples, with their inputs in data units.
        plan: with ``examples`` and ``features``, the transport plan between clean and adversarial features, summed by class: the mass
            ``(K, K)`` that moves from clean samples of a class (rows) to adversarial samples of a class (columns), in total 1. Mass
            beside the diagonal shows which classes the attack makes overlap.
        seconds: seconds of the ``"attacks"``, and in ``"total"``; with several processes, of the slowest.

    **Columns of the samples.**

    - ``label``, ``clean``, ``worst``: the label, the class that was predicted on the clean input, and the first wrong prediction
      under attack (or the clean one, if there is none). A prediction of -1 stands for outputs that are NaN or infinite. Where a
      sample has several labels (masks) there is only ``pixels``, the number of them that count, in the place of these columns;
    - ``clean_right``, ``robust_right``: the share of the sample's labels that are right on the clean input, and on it and under
      every attack. With one label for each sample it is 0 or 1; it is NaN if no label counts;
    - ``broken_by``: index in ``attacks`` of the first attack that turned a label wrong; -1 if none did, -2 if no label was right on
      the clean input;
    - ``distance``: with ``distances``, the distance to the decision boundary in data units, 0 where the clean input is
      misclassified, infinite where nothing was found. It is an upper bound, which a better attack may lower;
    - ``rank``: with several processes, the process that evaluated the sample.

    Example:
        >>> import torch
        >>> from lightning_wdefense import ThreatModel, evaluate
        >>> batch = torch.tensor([[2.0, 0.0], [0.2, 0.0]]), torch.tensor([0, 0])
        >>> result = evaluate(torch.nn.Identity(), [batch], ThreatModel(norm="l2", eps=0.5, bounds=None), features=None)
        >>> print(result)
        l2, eps 0.5, 2 samples
                         value  95% interval
        clean_acc       1.0000  0.342 to 1.000
        robust_acc      0.5000  0.095 to 0.905
        robust_acc_pgd  0.5000  0.095 to 0.905
        attack_success  0.5000
        >>> result.robust_acc, result.samples["broken_by"]
        (0.5, tensor([-1,  0]))
    """

    values: dict[str, float]
    samples: Samples
    threat: ThreatModel
    attacks: tuple[str, ...]
    curve: AccuracyCurve | None = None
    examples: Examples | None = None
    plan: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def clean_acc(self) -> float:
        """Accuracy on clean inputs, in [0, 1]."""
        return self.values[CLEAN]

    @property
    def robust_acc(self) -> float:
        """Robust accuracy, in [0, 1]: the worst case of each sample over all attacks."""
        return self.values[ROBUST]

    @property
    def attack_success(self) -> float:
        """Share of the samples classified correctly on clean inputs that the attacks made wrong, in [0, 1]."""
        return self.values["attack_success"]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson 95% intervals of the accuracies, by their names.

        They say how well the sample of data fixes the accuracy under these attacks, and nothing about stronger attacks. A mask
        counts as one sample, because its pixels depend on each other: the interval is rather too wide.
        """
        names = (name for name in self.values if name.startswith((CLEAN, ROBUST)))
        return {name: wilson_interval(self.values[name], self.count) for name in names}

    def by_class(self) -> ClassAccuracies:
        """Clean and robust accuracy of each class.

        Raises:
            ValueError: if the samples are masks, with several labels each.
        """
        return accuracies_by_class(self.samples)

    def confusion(self) -> Tensor:
        """Number of samples by label (rows) and prediction under attack (columns), ``(K, K)``.

        The prediction is ``worst``: the first wrong one, or the label where none was wrong. Predictions of no class (-1) are left out.

        Raises:
            ValueError: if the samples are masks, with several labels each.
        """
        return confusion_of(self.samples)

    def to_pandas(self) -> DataFrame:
        """The samples as a table, one row each; ``broken_by`` holds the attack's name, ``"clean"``, or ``None`` for no attack.

        Raises:
            ModuleNotFoundError: if pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_pandas() needs pandas. Install it with `pip install pandas`, or read the columns of `samples`, which are tensors."
            ) from error
        names = {**dict(enumerate(self.attacks)), NO_ATTACK: None, WITHOUT_ATTACK: "clean"}
        columns: dict[str, Any] = {name: column.numpy() for name, column in self.samples.items()}
        broken_by = [names[index] for index in self.samples["broken_by"].tolist()]
        return pandas.DataFrame(columns | {"broken_by": pandas.Series(broken_by, dtype=object)})

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the accuracy curve, or without one the accuracies as bars; with their 95% intervals.

        Args:
            ax: matplotlib axes to draw on; by default those of a new figure.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return self._bars(ax) if self.curve is None else self._curve(self.curve, ax)

    def __repr__(self) -> str:
        """The values with their intervals, as a table."""
        width, intervals = max(map(len, self.values)), self.intervals
        rows = [f"{self.threat.norm}, eps {self.threat.eps:.4g}, {len(self.samples['broken_by'])} samples"]
        rows.append(f"{'':{width}}   value  95% interval")
        for name, value in self.values.items():
            low, high = intervals.get(name, (None, None))
            interval = "" if low is None else f"  {low:.3f} to {high:.3f}"
            rows.append(f"{name:{width}}  {value:.4f}{interval}")
        return "\n".join(rows)

    @property
    def count(self) -> int:
        """Number of samples with a label that counts."""
        return int(self.samples["clean_right"].isfinite().sum())

    def _curve(self, curve: AccuracyCurve, ax: Axes | None) -> tuple[Figure, Axes]:
        figure, ax = curve.plot(ax)
        ends = [wilson_interval(share, self.count) for share in curve.accuracies.tolist()]
        lows, highs = ([end[side] for end in ends] for side in (0, 1))
        ax.fill_between(curve.epsilons.tolist(), lows, highs, alpha=0.2, linewidth=0)
        ax.set_xlabel(f"eps ({self.threat.norm})")
        return figure, ax

    def _bars(self, ax: Axes | None) -> tuple[Figure, Axes]:
        figure, ax = get_axes(ax)
        names = {CLEAN: "clean", **{f"{ROBUST}_{attack}": attack for attack in self.attacks}}
        if len(self.attacks) > 1:
            names[ROBUST] = "worst case"
        shares = [self.values[name] for name in names]
        ends = [self.intervals[name] for name in names]
        errors = [
            [share - low for share, (low, _) in zip(shares, ends, strict=True)],
            [high - share for share, (_, high) in zip(shares, ends, strict=True)],
        ]
        bars = ax.bar(range(len(shares)), shares, color=["C0", *["C1"] * len(self.attacks), "C3"][: len(shares)])
        ax.errorbar(range(len(shares)), shares, errors, fmt="none", ecolor="0.2", capsize=4)
        for bar, share, (_, high) in zip(bars, shares, ends, strict=True):
            ax.annotate(
                f"{share:.1%}",
                (bar.get_x() + bar.get_width() / 2, high),
                (0, 3),
                textcoords="offset points",
                ha="center",
            )
        ax.set_xticks(range(len(shares)), names.values(), rotation=30 if len(shares) > 5 else 0)
        ax.set(ylabel=f"Accuracy ({self.threat.norm}, eps {self.threat.eps:.4g})", ylim=(0, 1.1))
        return figure, ax
