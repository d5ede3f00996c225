"""Robust accuracy: accuracy under several attacks, and in the worst case over them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_wdefense.metrics._plot import plot_values
from lightning_wdefense.metrics._predictions import is_correct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STATE = "correct_"


def robust_accuracy(
    clean_preds: Tensor,
    adversarial_preds: Mapping[str, Tensor],
    target: Tensor,
    ignore_index: int | None = None,
) -> dict[str, Tensor]:
    """Compute the accuracy on clean inputs, under each attack, and in the worst case over all attacks.

    A sample is robust if it is correct on the clean input *and* under every attack. The worst case is taken per sample,
    so it can be lower than the accuracy under the strongest single attack. The clean input is in the eps ball of every
    attack. So a sample that is wrong on the clean input counts as wrong under every attack.

    Args:
        clean_preds: outputs on clean inputs: logits or probabilities ``(N, C, ...)``, class indices ``(N, ...)``, or
            the logits (not probabilities) of a binary classifier, ``(N,)`` or ``(N, 1, ...)``. With further dimensions
            (segmentation) each element counts.
        adversarial_preds: mapping from the name of each attack to the outputs on its adversarial inputs, in the form of
            ``clean_preds``. Without any attack, ``robust`` equals ``clean``.
        target: integer labels ``(N, ...)``, soft labels ``(N, C, ...)``, or binary labels as floats.
        ignore_index: label of elements that are left out, such as 255 or -100 in masks; ``None`` for none.

    Returns:
        Shares in [0, 1]: ``"clean"``, ``"robust"``, and one entry for each attack. NaN if there is no sample.

    Raises:
        TypeError: If predictions or labels are not tensors, or ``adversarial_preds`` is not a mapping by name.
        ValueError: If shapes do not match, a prediction is NaN, a label is not a class of the logits, or an attack is
            called "clean" or "robust".

    References:
        Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", ICML 2020 (the worst case over attacks).

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import robust_accuracy
        >>> target = torch.tensor([0, 1, 2, 1])
        >>> clean = torch.tensor([0, 1, 2, 0])
        >>> robust_accuracy(clean, {"fgsm": torch.tensor([0, 2, 2, 1]), "pgd": torch.tensor([1, 1, 2, 0])}, target)
        {'clean': tensor(0.7500), 'robust': tensor(0.2500), 'fgsm': tensor(0.5000), 'pgd': tensor(0.5000)}
    """
    _check_mapping(adversarial_preds)
    names = _check_names(adversarial_preds)
    counts, total = _count_correct(clean_preds, adversarial_preds, names, target, ignore_index)
    return {name: count / total for name, count in counts.items()}


class RobustAccuracy(Metric):
    """Accuracy on clean inputs, under each attack, and in the worst case over all attacks.

    A sample is robust if it is correct on the clean input *and* under every attack. The metric accumulates
    :func:`robust_accuracy` over batches and processes.

    ``update`` and ``forward`` accept ``clean_preds`` and ``target`` (tensors) and ``adversarial_preds`` (a mapping from
    the attack's name to a tensor), with the shapes given in :func:`robust_accuracy`. ``compute`` returns a dictionary
    of scalars in [0, 1]: ``"clean"``, ``"robust"``, and one for each attack. Before any update they are NaN, with the
    warning that torchmetrics gives.

    Args:
        attacks: names of the attacks that every update contains, in the order of the result. With ``None`` the first
            update sets them (in alphabetical order), and they do not change later, not even by ``reset``.
        ignore_index: label of elements that are left out, such as 255 or -100 in masks; ``None`` for none.
        kwargs: keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If ``attacks`` is a string, or a name is not a string.
        ValueError: If a name is repeated, or is "clean" or "robust"; in ``update``, if the names differ from those of
            earlier updates, or as :func:`robust_accuracy`; in ``compute``, if processes have different attacks.

    References:
        Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks", ICML 2020 (the worst case over attacks).

    Example:
        >>> import torch
        >>> from lightning_wdefense.metrics import RobustAccuracy
        >>> metric = RobustAccuracy(attacks=("pgd",))
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> adversarial_logits = torch.tensor([[1.0, 0.5], [0.3, 0.2], [1.0, 0.0]])
        >>> metric.update(logits, {"pgd": adversarial_logits}, torch.tensor([0, 1, 0]))
        >>> metric.compute()
        {'clean': tensor(1.), 'robust': tensor(0.6667), 'pgd': tensor(0.6667)}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    total: Tensor

    def __init__(self, attacks: Sequence[str] | None = None, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.attacks: tuple[str, ...] | None = None
        self._discovers = attacks is None
        for state in ("total", f"{_STATE}clean", f"{_STATE}robust"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")
        if attacks is not None:
            self._add_attacks(_check_names(attacks))

    def update(self, clean_preds: Tensor, adversarial_preds: Mapping[str, Tensor], target: Tensor) -> None:
        """Add a batch of predictions; see the class for shapes."""
        _check_mapping(adversarial_preds)
        names = tuple(sorted(_check_names(adversarial_preds))) if self.attacks is None else self.attacks
        self._check_same_attacks(names, adversarial_preds)
        counts, total = _count_correct(clean_preds, adversarial_preds, names, target, self.ignore_index)
        if self.attacks is None:
            self._add_attacks(names)
        self.total = self.total + total
        for name, count in counts.items():
            setattr(self, _STATE + name, getattr(self, _STATE + name) + count)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies by name, as shares in [0, 1]."""
        return {name: getattr(self, _STATE + name) / self.total for name in ("clean", "robust", *(self.attacks or ()))}

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> tuple["Figure", "Axes"]:
        """Plot ``val``, a result or a list of results over steps (by default what ``compute`` returns), on ``ax``."""
        return plot_values(self, val, ax)

    def _add_attacks(self, names: tuple[str, ...]) -> None:
        self.attacks = names
        for name in names:
            zero = torch.zeros_like(self.total)
            self.add_state(_STATE + name, zero, dist_reduce_fx="sum", persistent=self._persistent["total"])

    @staticmethod
    def _check_same_attacks(expected: Iterable[str], got: Iterable[str]) -> None:
        missing, additional = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
        if missing or additional:
            raise ValueError(
                f"Every update should contain the same attacks, {sorted(expected)}. Missing: {missing}; additional:"
                f" {additional}. Run every attack on every batch, or use one metric for each set of attacks."
            )

    # If the first update sets the names, the two states of a merge can differ: forward() merges with the state before
    # it, a checkpoint can have more attacks than a new metric, and a rank can have no batch.

    def _adopt_attacks(self, state: Mapping[str, Any]) -> tuple[str, ...]:
        names = tuple(key.removeprefix(_STATE) for key in state if key.startswith(_STATE))
        names = tuple(name for name in names if name not in ("clean", "robust"))
        if self.attacks is None and (names or state.get("total", 0) > 0):
            self._add_attacks(names)
        return names

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        names = self._adopt_attacks(incoming_state)
        attacks = self.attacks or ()
        if set(names) != set(attacks) and incoming_state["total"] > 0:
            self._check_same_attacks(attacks, names)
        zeros = {_STATE + name: torch.zeros_like(self.total) for name in attacks}
        super()._reduce_states({**zeros, **incoming_state})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._adopt_attacks({key.removeprefix(prefix): value for key, value in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None) -> None:
        if self._discovers and torch.distributed.is_initialized():
            self._agree_on_attacks(process_group or self.process_group)
        super()._sync_dist(dist_sync_fn, process_group)

    def _agree_on_attacks(self, group: Any | None) -> None:
        # There is one collective operation per state, so the other ranks would wait forever for a rank with fewer states.
        met: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(met, self.attacks, group=group)
        known = [names for names in met if names is not None]
        for names in known[1:]:
            self._check_same_attacks(known[0], names)
        if self.attacks is None and known:
            self._add_attacks(known[0])
            self._cache = self._copy_state_dict()


def _count_correct(
    clean_preds: Tensor,
    adversarial_preds: Mapping[str, Tensor],
    names: Iterable[str],
    target: Tensor,
    ignore_index: int | None,
) -> tuple[dict[str, Tensor], int]:
    """Count the correct elements by name, and all elements."""
    clean = is_correct(clean_preds, target, "clean_preds", ignore_index)
    left = {
        name: clean & is_correct(adversarial_preds[name], target, f"adversarial_preds[{name!r}]", ignore_index)
        for name in names
    }
    robust = torch.stack([clean, *left.values()]).all(0)
    right = {"clean": clean, "robust": robust, **left}
    return {name: element.sum() for name, element in right.items()}, clean.numel()


def _check_mapping(adversarial_preds: Mapping[str, Tensor]) -> None:
    if not isinstance(adversarial_preds, Mapping):
        raise TypeError(
            "`adversarial_preds` should map each attack's name to its predictions, such as {'pgd': preds}, got"
            f" {type(adversarial_preds).__name__}."
        )


def _check_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"`attacks` should be a sequence of names, got the string {names!r}. Write ({names!r},).")
    names = tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"The names of attacks should be strings, got {names}.")
    if len(set(names)) < len(names) or {"clean", "robust"} & set(names):
        raise ValueError(
            f"The names of attacks should be distinct, and not 'clean' or 'robust', which are other entries of the"
            f" result, got {names}. Rename the attack."
        )
    return names
