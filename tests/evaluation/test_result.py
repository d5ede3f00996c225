"""What an evaluation returns: intervals, samples, tables and pictures."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from matplotlib import pyplot
from scipy import stats
from support.lightning_modules import digits_loaders, trained_classifier
from torch import nn

from lightning_wdefense import EvaluationResult, ThreatModel, evaluate
from lightning_wdefense.attacks import FGSM, PGD
from lightning_wdefense.evaluation import wilson_interval

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
ATTACKS = {"fgsm": FGSM(THREAT), "strong": PGD(THREAT, steps=5, random_start=False)}


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    return evaluate(trained_classifier().net, digits_loaders()[1], THREAT, ATTACKS, progress=False)


@pytest.fixture(scope="module")
def with_curve() -> EvaluationResult:
    return evaluate(
        trained_classifier().net, digits_loaders()[1], THREAT, ["fgsm"], epsilons=[0.05, 0.2], progress=False
    )


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (1, 1), (63, 128), (998, 1000), (40, 1_000_000)])
def test_interval_is_scipys(right, count):
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_of_nothing_is_unknown():
    assert torch.tensor([wilson_interval(0.5, 0), wilson_interval(float("nan"), 5)]).isnan().all()


def test_accuracies_have_intervals_of_all_samples(result):
    assert list(result.intervals) == ["clean_acc", "robust_acc", "robust_acc_fgsm", "robust_acc_strong"]
    assert result.intervals["robust_acc"] == wilson_interval(result.robust_acc, 128)


def test_samples_are_what_attacking_by_hand_says(result):
    module = trained_classifier().net.eval()
    inputs, labels = (torch.cat(part) for part in zip(*digits_loaders()[1], strict=True))
    clean = module(inputs).argmax(1)
    after = {name: module(attack(module, inputs, labels)).argmax(1) for name, attack in ATTACKS.items()}
    expected = []
    for index, label in enumerate(labels.tolist()):
        predicted = [clean[index].item(), *(found[index].item() for found in after.values())]
        wrong = [place for place, found in enumerate(predicted) if found != label]
        expected.append((label, predicted[0], predicted[wrong[0]] if wrong else label, wrong[0] if wrong else None))
    assert {row[3] for row in expected} == {None, 0, 1, 2}  # else this shows little
    codes = {None: -1, 0: -2, 1: 0, 2: 1}
    for column, name in enumerate(("label", "clean", "worst", "broken_by")):
        found = result.samples[name].tolist()
        assert found == [codes[row[3]] if name == "broken_by" else row[column] for row in expected]
    assert result.samples["clean_right"].mean().item() == pytest.approx(result.clean_acc)
    assert result.samples["robust_right"].mean().item() == pytest.approx(result.robust_acc)


def test_independent_attacks_break_in_the_given_order():
    attacks = dict(reversed(ATTACKS.items()))
    model, loader = trained_classifier().net, digits_loaders()[1]
    in_order = evaluate(model, loader, THREAT, attacks, progress=False)
    alone = evaluate(model, loader, THREAT, attacks, independent=True, progress=False)
    assert alone.values["robust_acc_fgsm"] > alone.robust_acc  # what PGD broke before withstands FGSM
    for name, column in in_order.samples.items():
        assert torch.equal(alone.samples[name], column)


def test_pixels_of_a_mask():
    class Bright(nn.Module):
        """Each pixel is of class 1 where it is above one half."""

        def forward(self, x):
            return torch.cat([1 - x, x], 1)

    inputs = torch.tensor([[0.9, 0.9, 0.55, 0.1], [0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.9, 0.1]])
    labels = torch.tensor([[1, 1, 1, 1], [1, -100, 1, 1], [-100] * 4, [1, 1, 0, 1]])
    loader = [(inputs.reshape(4, 1, 2, 2), labels.reshape(4, 2, 2))]
    found = evaluate(Bright(), loader, THREAT, ["fgsm"], features=None, progress=False)
    assert found.samples["pixels"].tolist() == [4, 3, 0, 4]
    assert found.samples["clean_right"].nan_to_num(-1).tolist() == pytest.approx([0.75, 1, -1, 0])
    assert found.samples["robust_right"].nan_to_num(-1).tolist() == pytest.approx([0.5, 1, -1, 0])
    assert found.samples["broken_by"].tolist() == [0, -1, -1, -2]
    assert found.robust_acc == pytest.approx(5 / 11)
    assert found.intervals["robust_acc"] == wilson_interval(found.robust_acc, 3)  # of the images with a label


def test_table_of_pandas(result):
    pandas = pytest.importorskip("pandas")
    table = result.to_pandas()
    assert list(table) == ["label", "clean", "worst", "clean_right", "robust_right", "broken_by"]
    assert len(table) == 128
    assert table["broken_by"].isna().mean() == pytest.approx(result.robust_acc)
    assert table["broken_by"].value_counts().to_dict() == {
        "clean": round(128 * (1 - result.clean_acc)),
        "fgsm": round(128 * (result.clean_acc - result.values["robust_acc_fgsm"])),
        "strong": round(128 * (result.values["robust_acc_fgsm"] - result.robust_acc)),
    }
    assert pandas.api.types.is_integer_dtype(table["label"])


def test_without_pandas(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"`pip install pandas`.*`samples`"):
        result.to_pandas()


def test_it_prints_as_a_table(result):
    low, high = result.intervals["robust_acc"]
    rows = str(result).splitlines()
    assert rows[0] == "linf, eps 0.1, 128 samples"
    assert rows[3].split() == ["robust_acc", f"{result.robust_acc:.4f}", f"{low:.3f}", "to", f"{high:.3f}"]
    assert [row.split()[0] for row in rows[2:]] == list(result.values)
    assert repr(result) == str(result)


def test_it_can_be_saved(result, with_curve):
    for each in (result, with_curve):
        again = pickle.loads(pickle.dumps(each))
        assert str(again) == str(each)
        assert torch.equal(again.samples["worst"], each.samples["worst"])


def test_bars(result):
    figure, ax = result.plot()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["clean", "fgsm", "strong", "worst case"]
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == [
        result.values[name] for name in ("clean_acc", "robust_acc_fgsm", "robust_acc_strong", "robust_acc")
    ]
    (lines,) = (each for each in ax.collections if hasattr(each, "get_segments"))
    ends = [tuple(segment[:, 1]) for segment in lines.get_segments()]
    assert ends == [
        pytest.approx(result.intervals[name])
        for name in ("clean_acc", "robust_acc_fgsm", "robust_acc_strong", "robust_acc")
    ]
    pyplot.close(figure)


def test_one_attack_is_its_own_worst_case(with_curve):
    figure, ax = EvaluationResult(with_curve.values, with_curve.samples, THREAT, with_curve.attacks).plot()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["clean", "fgsm"]
    pyplot.close(figure)


def test_curve_with_its_band(with_curve):
    figure, ax = pyplot.subplots()
    assert with_curve.plot(ax) == (figure, ax)
    (line,) = ax.lines
    assert line.get_ydata().tolist() == with_curve.curve.accuracies.tolist()
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    ends = [wilson_interval(share, 128) for share in with_curve.curve.accuracies.tolist()]
    assert (heights.min(), heights.max()) == pytest.approx((ends[-1][0], ends[0][1]))
    pyplot.close(figure)
