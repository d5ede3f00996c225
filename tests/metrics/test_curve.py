import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from sklearn.metrics import auc

from lightning_wdefense.metrics import RobustAccuracyCurve, area_under_accuracy_curve, robust_accuracy_curve


@st.composite
def curves(draw):
    steps = draw(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    size = draw(st.integers(1, 30))
    preds = torch.randint(2, (len(steps) + 1, size), generator=generator)
    return np.cumsum([0.0, *steps]).tolist(), preds, torch.randint(2, (size,), generator=generator)


@settings(max_examples=60, deadline=None)
@given(curves())
def test_against_numpy_and_scikit_learn(drawn):
    epsilons, preds, target = drawn
    curve = robust_accuracy_curve(preds, target, epsilons)
    right = (preds == target).numpy()
    expected = [np.mean([right[: k + 1, i].all() for i in range(len(target))]) for k in range(len(epsilons))]
    np.testing.assert_allclose(curve.accuracies, expected, rtol=1e-6)
    np.testing.assert_allclose(curve.epsilons, epsilons, rtol=1e-6)
    assert curve.auac.item() == pytest.approx(auc(epsilons, expected) / epsilons[-1], abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(curves())
def test_curve_never_rises_and_bounds_its_area(drawn):
    epsilons, preds, target = drawn
    curve = robust_accuracy_curve(preds, target, epsilons)
    assert (curve.accuracies.diff() <= 0).all()
    assert curve.accuracies[-1] - 1e-6 <= curve.auac <= curve.accuracies[0] + 1e-6


def test_sequence_and_stack_are_the_same():
    preds = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    target = preds[0].argmax(1)
    torch.testing.assert_close(
        robust_accuracy_curve(preds, target, (0, 1, 2)), robust_accuracy_curve(list(preds), target, (0, 1, 2))
    )


def test_segmentation_counts_elements():
    preds = torch.tensor([[[[0, 1], [1, 1]]], [[[0, 1], [0, 0]]]])
    curve = robust_accuracy_curve(preds, torch.tensor([[[0, 1], [1, 1]]]), (0.0, 0.5))
    assert curve.accuracies.tolist() == [1.0, 0.5]


def test_area_of_whole_numbers_and_of_many_curves():
    assert area_under_accuracy_curve([0, 2], [1, 0]) == 0.5
    areas = area_under_accuracy_curve(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(areas, torch.tensor([1.0, 1 / 6]))


def test_plot_puts_the_area_and_the_label_in_the_legend():
    metric = RobustAccuracyCurve((0.0, 0.5))
    metric.update(torch.tensor([[0, 1], [0, 0]]), torch.tensor([0, 1]))
    _, ax = metric.plot(label="TRADES")
    metric.plot(ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["TRADES (AUAC=0.750)", "AUAC=0.750"]
    assert ax.lines[0].get_xydata().tolist() == [[0.0, 1.0], [0.5, 0.5]]
    pyplot.close("all")
