"""Bad input to `evaluate` says what to do, as early as it can."""

from __future__ import annotations

import math

import pytest
import torch
from support.lightning_modules import DigitsClassifier, digits, digits_loaders, trained_classifier
from torch import nn

from lightning_wdefense import ThreatModel, evaluate
from lightning_wdefense.attacks import PGD, get_attack

THREAT = ThreatModel(eps=0.1)
IMAGES, LABELS = (each[:16] for each in digits())


def never():
    """A loader that must not be asked."""
    raise AssertionError("the loader was asked for a batch")
    yield


BEFORE = {
    "unbounded": ({"attacks": ["n-fgsm"]}, ValueError, r"'n-fgsm' leaves the threat model's ball.*training only.*'pgd'"),
    "unbounded-object": ({"attacks": [get_attack("n-fgsm", THREAT)]}, ValueError, "leaves the threat model's ball"),
    "other-threat": ({"attacks": [PGD(THREAT.with_eps(0.2))]}, ValueError, r"'pgd' was made for .*eps=0\.2.*threat="),
    "unknown": ({"attacks": ["autoatack"]}, ValueError, "Did you mean 'autoattack'"),
    "string": ({"attacks": "pgd"}, ValueError, r"attacks=\['pgd'\]"),
    "reserved-name": ({"attacks": {"clean": "pgd"}}, ValueError, "'clean' or 'robust'"),
    "no-threat": ({"threat": 0.1}, TypeError, r"An evaluation needs a threat model, such as ThreatModel\(eps=0\.1\)"),
    "no-batches": ({"max_batches": 0}, ValueError, "max_batches must be at least 1, or None.*got 0"),
    "no-radii": ({"epsilons": [0]}, ValueError, "at least one larger budget"),
    "unknown-layer": ({"features": "hiden"}, ValueError, "'hiden'.*Did you mean 'hidden'"),
    "function": ({"model": lambda x: x}, TypeError, "nn.Module from inputs to logits, got a function"),
    "sharded": ({"model": type("FullyShardedDataParallel", (nn.Module,), {})()}, TypeError, "FullyShardedDataParallel cannot be attacked: .*DistributedDataParallel"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE)
def test_before_any_batch(case):
    options, error, message = BEFORE[case]
    options = {"model": trained_classifier().net, "threat": THREAT} | options
    with pytest.raises(error, match=message):
        evaluate(options.pop("model"), never(), options.pop("threat"), **options)


def test_an_unknown_layer_of_a_compiled_model():
    with pytest.raises(ValueError, match=r"'hiden'.*Did you mean 'hidden'"):
        evaluate(torch.compile(trained_classifier().net, backend="eager"), never(), THREAT, features="hiden")


class Probabilities(DigitsClassifier):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Named(DigitsClassifier):
    def forward(self, x):
        return {"scores": super().forward(x)}


class Regressor(nn.Module):
    def __init__(self, width=1):
        super().__init__()
        self.net = nn.Linear(64, width)

    def forward(self, x):
        return self.net(x.flatten(1))


FIRST_BATCH = {
    "no-labels": ({"image": IMAGES, "digit": LABELS}, DigitsClassifier, {}, ValueError, "No labels.*'image', 'digit'.*labels="),
    "no-inputs": ({"pixels": IMAGES, "depths": IMAGES, "label": LABELS}, DigitsClassifier, {}, ValueError, "No inputs.*inputs="),
    "one-tensor": (IMAGES, DigitsClassifier, {}, ValueError, r"No labels.*one tensor of shape \(16, 1, 8, 8\)"),
    "wrong-key": ({"image": IMAGES, "label": LABELS}, DigitsClassifier, {"labels": "digit"}, ValueError, "labels='digit' names nothing"),
    "views": (([IMAGES, IMAGES], LABELS), DigitsClassifier, {}, ValueError, "has 2 tensors of inputs.*inputs="),
    "normalised": (((IMAGES - 0.3) / 0.4, LABELS), DigitsClassifier, {}, ValueError, r"mean and std are not set.*ThreatModel\(mean="),
    "integer-images": (((IMAGES * 255).byte(), LABELS), DigitsClassifier, {}, TypeError, r"torch.uint8.*x\.float\(\) / 255"),
    "probabilities": ((IMAGES, LABELS), Probabilities, {}, ValueError, "look like probabilities"),
    "dictionary": ((IMAGES, LABELS), Named, {}, TypeError, "not logits but a dict.*outputs="),
    "wrong-output": ((IMAGES, LABELS), Named, {"outputs": "score"}, ValueError, r"outputs='score' is not in.*\['scores'\]"),
    "wrong-labels": ((IMAGES, LABELS + 5), DigitsClassifier, {}, ValueError, r"labels run from .* to 14.*10 classes"),
    "regression": ((IMAGES, torch.randn(16, 1)), Regressor, {}, ValueError, "labels of a binary classifier.*RobustnessMonitor can attack the loss"),
    "several-targets": ((IMAGES, torch.randn(16, 3)), lambda: Regressor(3), {}, ValueError, "Soft labels.*RobustnessMonitor can attack the loss"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FIRST_BATCH)
def test_at_the_first_batch(case):
    batch, model, options, error, message = FIRST_BATCH[case]

    def batches():
        yield batch
        raise AssertionError("the loader was asked for another batch")

    with pytest.raises(error, match=f"(?s){message}"):
        evaluate(model(), batches(), THREAT, ["fgsm"], progress=False, **options)


@pytest.mark.parametrize("empty", [[], iter(())])
def test_an_empty_loader(empty):
    with pytest.raises(ValueError, match=r"gave no batch.*only once"):
        evaluate(trained_classifier().net, empty, THREAT)


def test_labels_and_masks_in_one_loader():
    class Either(nn.Module):
        def forward(self, x):
            return x if self.dense else x.mean((2, 3))

        dense = False

    def batches():
        x = torch.rand(4, 3, 8, 8)
        yield x, torch.zeros(4, dtype=torch.long)
        Either.dense = True
        yield x, torch.zeros(4, 8, 8, dtype=torch.long)

    with pytest.raises(ValueError, match="evaluate them apart"):
        evaluate(Either(), batches(), THREAT, ["fgsm"], features=None, progress=False)


def test_a_diverged_model_is_measured_with_a_warning():
    module = trained_classifier()
    nn.init.constant_(module.net.hidden.weight, float("nan"))
    with pytest.warns(UserWarning, match="NaN or infinite for 32 of 32 predictions, which count as wrong"):
        result = evaluate(module.net, digits_loaders()[1], THREAT, epsilons=[0.05], progress=False)
    assert result.clean_acc == result.robust_acc == result.values["auac"] == 0
    assert math.isnan(result.values["transport_shift"])
    assert math.isnan(result.attack_success)
    assert set(result.samples["clean"].tolist()) == {-1}
    assert set(result.samples["broken_by"].tolist()) == {-2}
    assert "nan" in str(result)
