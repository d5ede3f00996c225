"""What every metric must do. One table drives it: a new metric joins by a line in ``CASES``."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.processes import group_ends
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from lightning_wdefense.metrics import (
    AttackSuccessRate,
    Detectability,
    DistributionalAccuracy,
    RobustAccuracy,
    RobustAccuracyCurve,
    Sensitivity,
    TransportShift,
)

matplotlib.use("Agg")

SIZES = (40, 24, 33)


def logits(size: int, seed: int) -> Tensor:
    # Values that half precision holds exactly, so that the same predictions come in every precision.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (size, 4), generator=generator) + torch.arange(4) / 8


def labels(size: int, seed: int) -> Tensor:
    return logits(size, seed).argmax(1)  # so the clean predictions of the same seed are right, but for the last ones


def clean_logits(size: int, seed: int) -> Tensor:
    return torch.cat([logits(size, seed)[: size - size // 4], logits(size // 4, seed + 1)])


def attacked(size: int, seed: int) -> Tensor:
    return clean_logits(size, seed) + 0.75 * logits(size, seed + 2)


def features(size: int, seed: int) -> Tensor:
    return logits(size, seed).view(size, 2, 2) / 8


class Case(NamedTuple):
    make: Callable[[], Metric]
    batch: Callable[[int, int], tuple]  # of a size and a seed: the arguments of `update`
    plots_lists: bool = True


def _robust(size: int, seed: int) -> tuple:
    attacks = {"pgd": attacked(size, seed), "fgsm": attacked(size, seed + 5)}
    return clean_logits(size, seed), attacks, labels(size, seed)


def _success(size: int, seed: int) -> tuple:
    return clean_logits(size, seed), attacked(size, seed), labels(size, seed)


def _curve(size: int, seed: int) -> tuple:
    return [clean_logits(size, seed), attacked(size, seed), attacked(size, seed + 5)], labels(size, seed)


def _shift(size: int, seed: int) -> tuple:
    return features(size, seed), features(size, seed + 1) + 0.5


def _labelled_shift(size: int, seed: int) -> tuple:
    return *_shift(size, seed), labels(size, seed)


def _scores(size: int, seed: int) -> tuple:
    return logits(size, seed)[:, 0], logits(size, seed + 1)[:, 0] + 4.0


def _distances(size: int, seed: int) -> tuple:
    return (features(size, seed)[:, 0, 0].clamp(min=0),)  # some of them 0: misclassified already


def _weighted_distances(size: int, seed: int) -> tuple:
    return *_distances(size, seed), features(size, seed + 1)[:, 0, 1].abs() + 0.5


def _gradients(size: int, seed: int) -> tuple:
    return (features(size, seed),)


CASES = {
    "RobustAccuracy(named)": Case(lambda: RobustAccuracy(("pgd", "fgsm")), _robust),
    "RobustAccuracy(discovered)": Case(RobustAccuracy, _robust),
    "RobustAccuracy(ignore_index)": Case(lambda: RobustAccuracy(ignore_index=3), _robust),
    "AttackSuccessRate": Case(AttackSuccessRate, _success),
    "RobustAccuracyCurve": Case(lambda: RobustAccuracyCurve((0.0, 0.1, 0.2)), _curve, plots_lists=False),
    "Detectability": Case(lambda: Detectability(resamples=50), _scores),
    "DistributionalAccuracy": Case(lambda: DistributionalAccuracy((0.1, 0.3, 0.5)), _distances, plots_lists=False),
    "DistributionalAccuracy(weights)": Case(
        lambda: DistributionalAccuracy((0.3,), p=1.5), _weighted_distances, plots_lists=False
    ),
    "Sensitivity": Case(lambda: Sensitivity(p=1.5, norm="linf"), _gradients),
    "Sensitivity(largest)": Case(lambda: Sensitivity(p=1, norm="l1"), _gradients),
    "TransportShift": Case(TransportShift, _shift),
    "TransportShift(labels)": Case(lambda: TransportShift(label_cost=0.5), _labelled_shift),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def batches_of(case: Case, sizes: tuple[int, ...] = SIZES) -> list[tuple]:
    return [case.batch(size, 10 * i) for i, size in enumerate(sizes)]


def joined(batches: list[tuple]) -> tuple:
    return tree_map(lambda *parts: torch.cat(parts), *batches)


def value_of(case: Case, *batches: tuple):
    metric = case.make()
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def tensors_of(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_same(actual, expected, **tolerance) -> None:
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, equal_nan=True, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


def test_batches_add_up_to_one_update_on_everything(case):
    batches = batches_of(case)
    whole = value_of(case, joined(batches))
    assert_same(value_of(case, *batches), whole)
    assert all(torch.isfinite(leaf).all() for leaf in tensors_of(whole))


def test_forward_gives_the_value_of_the_batch_and_accumulates(case):
    batches, metric = batches_of(case), case.make()
    for batch in batches:
        assert_same(metric(*batch), value_of(case, batch))
    assert_same(metric.compute(), value_of(case, *batches))


def test_reset_forgets(case):
    first, second, _ = batches_of(case)
    metric = case.make()
    metric.update(*first)
    metric.compute()
    metric.reset()
    metric.update(*second)
    assert_same(metric.compute(), value_of(case, second))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies_go_on_by_themselves(case, duplicate):
    first, second, third = batches_of(case)
    metric = case.make()
    metric.update(*first)
    twin = duplicate(metric)
    metric.update(*second)
    twin.update(*third)
    assert_same(metric.compute(), value_of(case, first, second))
    assert_same(twin.compute(), value_of(case, first, third))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_state_dict_restores_a_fresh_metric(case):
    first, second, _ = batches_of(case)
    metric, fresh = case.make(), case.make()
    metric.persistent(True)
    metric.update(*first)
    parent = torch.nn.ModuleDict({"metric": fresh})
    parent.load_state_dict({f"metric.{key}": value for key, value in metric.state_dict().items()})
    assert_same(fresh.compute(), metric.compute())
    fresh.update(*second)
    assert_same(fresh.compute(), value_of(case, first, second))
    assert not case.make().state_dict(), "states should stay out of users' checkpoints unless asked for"


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="needs torchmetrics 1.6 or later")
def test_merge_state(case):
    first, second, _ = batches_of(case)
    metric, other, fresh = case.make(), case.make(), case.make()
    if metric.full_state_update:
        pytest.skip("torchmetrics merges only what is a plain reduction of batches")
    metric.update(*first)
    other.update(*second)
    metric.merge_state(other)
    fresh.merge_state(metric)
    assert_same(metric.compute(), value_of(case, first, second))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert_same(fresh.compute(), metric.compute())


def test_nothing_seen_gives_nan_and_the_warning_of_torchmetrics(case):
    with pytest.warns(UserWarning, match="before the ``update``"):
        value = case.make().compute()
    *_, last = tensors_of(value)
    assert torch.isnan(last)


def test_an_empty_batch_changes_nothing(case):
    batch = case.batch(40, 0)
    empty = tree_map(lambda leaf: leaf[:0], batch)
    assert_same(value_of(case, empty, batch, empty), value_of(case, batch))
    *_, last = tensors_of(value_of(case, empty))
    assert torch.isnan(last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_the_outputs_does_not_matter(case, dtype):
    batch = case.batch(40, 0)
    cast = tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)
    assert_same(value_of(case, cast), value_of(case, batch))


def test_counts_stay_exact_in_a_half_precision_module(case):
    batch, metric = case.batch(999, 0), case.make()
    if isinstance(metric, TransportShift):
        pytest.skip("keeps features, in the precision of the module")
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    metric.update(*batch)
    assert_same(metric.compute(), value_of(case, batch))


def test_updates_inside_and_outside_of_inference_mode_mix(case):
    first, second, third = batches_of(case)
    metric = case.make()
    with torch.inference_mode():
        metric.update(*first)
        metric.compute()
        metric.reset()
        metric.update(*first)
    metric.update(*second)
    metric = metric.clone()
    metric(*third)
    assert_same(metric.compute(), value_of(case, first, second, third))


def test_declares_what_torchmetrics_asks_for(case):
    kind = type(case.make())
    for constant in ("is_differentiable", "higher_is_better", "full_state_update"):
        assert isinstance(getattr(kind, constant), bool)
    assert ">>>" in kind.__doc__


def test_plot(case):
    from matplotlib import pyplot

    batch, metric = case.batch(40, 0), case.make()
    value = metric(*batch)
    figure, ax = metric.plot()
    assert figure is ax.get_figure()
    same_figure, same_ax = metric.plot(value, ax=ax)
    assert (same_figure, same_ax) == (figure, ax)
    assert len(ax.lines) >= 2
    if case.plots_lists:
        metric.plot([value, value])
    pyplot.close("all")


def test_plot_without_matplotlib_says_what_to_install(case, monkeypatch):
    metric = case.make()
    metric.update(*case.batch(40, 0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"lightning-wdefense\[plot\]\""):
        metric.plot()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(case):
    batches = batches_of(case)
    metric = case.make().to("cuda")
    for batch in batches:
        metric(*tree_map(lambda leaf: leaf.cuda(), batch))
    value = metric.compute()
    assert all(leaf.is_cuda for leaf in tensors_of(value))
    assert_same([leaf.cpu() for leaf in tensors_of(value)], tensors_of(value_of(case, *batches)), rtol=1e-3, atol=1e-5)


# Two processes: rank 0 sees two batches and rank 1 the third, or rank 0 sees all of them and rank 1 nothing.
SHARES = {"uneven": ((0, 1), (2,)), "one rank without data": ((0, 1, 2), ())}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    with group_ends():
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
        torch.save(_values(rank), f"{folder}/{rank}.pt")


def _values(rank: int) -> dict:
    """What a process sees of each metric."""
    values = {}
    for name, case in CASES.items():
        batches = batches_of(case)
        for share, seen in SHARES.items():
            metric = case.make()
            for i in seen[rank]:
                metric.update(*batches[i])
            first = metric.compute()
            metric.update(*batches[rank])  # goes on from the local state, not from the synced one
            values[name, share] = tree_leaves(first), tree_leaves(metric.compute())
    metric = RobustAccuracy()
    metric.update(labels(9, 0), {f"attack{rank}": labels(9, 0)}, labels(9, 0))
    with pytest.raises(ValueError, match="should contain the same attacks"):
        metric.compute()
    return values


@pytest.mark.slow  # most of it starts the processes; what a monitor logs is reduced over two in callbacks/test_ddp.py
def test_two_processes_give_the_value_on_the_union(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # for the import of this file in the processes
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        values = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, case in CASES.items():
            batches = batches_of(case)
            for share in SHARES:
                first, second = values[name, share]
                assert_same(first, tree_leaves(value_of(case, *batches)), rtol=1e-4, atol=1e-5)
                expected = tree_leaves(value_of(case, *batches, batches[0], batches[1]))
                assert_same(second, expected, rtol=1e-4, atol=1e-5)
