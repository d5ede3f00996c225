import pytest
import torch

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
