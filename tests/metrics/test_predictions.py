import pytest
import torch
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_wdefense.metrics import (
    AttackSuccessRate,
    RobustAccuracy,
    RobustAccuracyCurve,
    attack_success_rate,
    robust_accuracy,
    robust_accuracy_curve,
)
from lightning_wdefense.metrics._predictions import is_correct

INDICES = torch.tensor([0, 2, 1])
LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 1.0, 3.0]])
BINARY = torch.tensor([-1.5, 2.0, 0.0])
FORMS = {
    "indices": (torch.tensor([0, 2, 2]), INDICES, [True, True, False]),
    "small integers": (torch.tensor([0, 2, 2], dtype=torch.uint8), INDICES.to(torch.int32), [True, True, False]),
    "logits": (LOGITS, INDICES, [True, True, False]),
    "probabilities": (LOGITS.softmax(1), INDICES, [True, True, False]),
    "soft labels": (LOGITS, torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]), [True, True, False]),
    "indices, soft labels": (torch.tensor([0, 1]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]), [True, False]),
    "labels as a column": (LOGITS, INDICES[:, None], [True, True, False]),
    "binary logits": (BINARY, torch.tensor([0, 1, 1]), [True, True, False]),
    "binary column": (BINARY[:, None], torch.tensor([0, 1, 1]), [True, True, False]),
    "binary column, float labels": (BINARY[:, None], torch.tensor([[0.0], [1.0], [1.0]]), [True, True, False]),
    "binary, smoothed labels": (BINARY, torch.tensor([0.1, 0.9, 0.9]), [True, True, False]),
    "binary, boolean labels": (BINARY, torch.tensor([False, True, True]), [True, True, False]),
    "binary logits between -1 and 1": (BINARY / 5, torch.tensor([0, 1, 0]), [True, True, True]),
    "binary, one half": (BINARY, torch.tensor([0.5, 0.5, 0.5]), [True, False, True]),
    "two logits, float labels": (LOGITS[:, :2], torch.tensor([0.0, 1.0, 0.0]), [True, True, False]),
    "segmentation": (LOGITS.T[None], INDICES[None], [[True, True, False]]),
    "binary segmentation": (BINARY.view(1, 1, 1, 3), torch.tensor([[[0, 1, 1]]]), [[[True, True, False]]]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error")
def test_forms_of_predictions_and_labels(form):
    preds, target, expected = FORMS[form]
    assert is_correct(preds, target).tolist() == expected


def test_binary_probabilities_are_warned_of():
    with pytest.warns(UserWarning, match="pass the logits or the class indices"):
        is_correct(torch.tensor([0.2, 0.9]), torch.tensor([0, 1]))


MASKS = torch.tensor([[[0, 1, 255], [2, 255, 1]]])
PIXELS = torch.tensor([[[0, 2, 1], [2, 0, 1]]])


@pytest.mark.parametrize("ignore_index", [255, -100, 7])
@pytest.mark.parametrize("form", ["indices", "logits", "soft"])
def test_ignored_elements_count_for_nothing(ignore_index, form):
    """As in torchmetrics' accuracy."""
    target = MASKS.masked_fill(MASKS == 255, ignore_index)
    preds = PIXELS if form == "indices" else torch.nn.functional.one_hot(PIXELS, 3).movedim(-1, 1).float()
    got = is_correct(preds, target, ignore_index=ignore_index)
    expected = multiclass_accuracy(PIXELS, target, num_classes=3, average="micro", ignore_index=ignore_index)
    assert got.shape == (4,)
    torch.testing.assert_close(got.float().mean(), expected)


def test_ignored_elements_of_binary_masks():
    logits, target = torch.tensor([[[1.0, -1, 2, -2]]]), torch.tensor([[[1.0, 1, 255, 0]]])
    assert is_correct(logits, target, ignore_index=255).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("metric", "arguments", "expected"),
    [
        (robust_accuracy, (PIXELS, {"pgd": PIXELS.flip(2)}, MASKS), {"clean": 0.75, "robust": 0.0, "pgd": 0.0}),
        (attack_success_rate, (PIXELS, PIXELS.flip(2), MASKS), 1.0),
        (
            RobustAccuracy(ignore_index=255),
            (PIXELS, {"pgd": PIXELS.flip(2)}, MASKS),
            {"clean": 0.75, "robust": 0.0, "pgd": 0.0},
        ),
        (AttackSuccessRate(ignore_index=255), (PIXELS, PIXELS.flip(2), MASKS), 1.0),
        (RobustAccuracyCurve([0, 1], ignore_index=255), ([PIXELS, PIXELS.flip(2)], MASKS), [0.75, 0.0]),
        (robust_accuracy_curve, ([PIXELS, PIXELS.flip(2)], MASKS, [0, 1]), [0.75, 0.0]),
    ],
    ids=lambda it: getattr(it, "__name__", type(it).__name__),
)
def test_every_accuracy_leaves_them_out(metric, arguments, expected):
    """Clean, three of four pixels are right, and all of these fall; the last is right only where it is not counted."""
    got = metric(*arguments) if isinstance(metric, Metric) else metric(*arguments, ignore_index=255)
    got = got.accuracies.tolist() if hasattr(got, "accuracies") else got
    assert got == pytest.approx(expected)


def test_255_among_classes_that_are_never_predicted_is_asked_about():
    with pytest.raises(ValueError, match=r"holds the label 255, which is never predicted.*pass ignore_index=255"):
        is_correct(PIXELS, MASKS)
    assert is_correct(PIXELS.masked_fill(PIXELS == 0, 255), MASKS).any()  # a class that is predicted
    assert not is_correct(torch.tensor([3]), torch.tensor([255])).any()  # one label a sample is a class
    logits = torch.nn.functional.one_hot(PIXELS, 256).movedim(-1, 1).float()
    assert is_correct(logits, MASKS).sum() == 3
