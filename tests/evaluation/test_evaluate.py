"""`evaluate` measures what RobustnessMonitor measures, to the bit, of any model and in any loop."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from lightning.fabric import Fabric
from support.lightning_modules import (
    DigitsClassifier,
    HeadlessDigitsClassifier,
    digits_loaders,
    quiet_trainer,
    trained_classifier,
)
from support.modules import Attending
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_wdefense import RobustnessMonitor, ThreatModel, evaluate
from lightning_wdefense.attacks import FGSM, FMN, PGD

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
ATTACKS = {"fgsm": "fgsm", "noisy": PGD(THREAT, steps=3)}  # PGD starts at random, so its noise must be the same


def monitored(loader, **options) -> tuple[dict[str, float], RobustnessMonitor]:
    """What a trainer logs with the monitor, without the stage."""
    monitor = RobustnessMonitor(THREAT, ATTACKS, **options)
    (values,) = quiet_trainer(callbacks=[monitor]).validate(trained_classifier(), loader, verbose=False)
    return {key[4:]: value for key, value in values.items() if key.startswith("val/") and key != "val/loss"}, monitor


def evaluated(loader, model=None, **options):
    return evaluate(model or trained_classifier().net, loader, THREAT, ATTACKS, progress=False, **options)


@pytest.fixture(scope="module")
def plain():
    return evaluated(digits_loaders()[1])


def same(result, expected) -> None:
    """The same values and samples, to the bit."""
    assert result.values == expected.values
    assert all(torch.equal(column, expected.samples[name]) for name, column in result.samples.items())


@pytest.mark.parametrize("format", ["tuple", "dict"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilons": [0.2, 0.05], "max_batches": 3},
        {"independent": True, "seed": 7},
        {"features": "outputs", "epsilons": [0.1]},
        {"distances": FMN(THREAT, steps=10), "p": 1, "max_batches": 2},
        {"features": None},
    ],
    ids=str,
)
def test_values_are_those_of_the_monitor_to_the_bit(format, options):
    expected, monitor = monitored(digits_loaders(format=format)[1], **options)
    result = evaluated(digits_loaders(format=format)[1], **options)
    assert result.values == expected
    assert (result.curve is None) == options.keys().isdisjoint({"epsilons", "distances"})
    if result.curve is not None:
        for ours, theirs in zip(result.curve, monitor.curves["val/robustness_curve"], strict=True):
            assert torch.equal(ours, theirs)


def test_the_noise_matters_to_the_values(plain):
    """Else the test above would not see whether it is the same."""
    values = [evaluated(digits_loaders()[1], seed=seed).values["transport_shift"] for seed in (0, 1)]
    assert values[0] == plain.values["transport_shift"] != values[1]


def test_masks_are_measured_as_by_the_monitor():
    def masks() -> DataLoader:
        inputs = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        target = (inputs.squeeze(1) * 3).long().clamp(max=2)
        target[:, 0] = 255
        return DataLoader(TensorDataset(inputs, target), 3)

    class Segmenter(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 3, 3, padding=1)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=255)

        def validation_step(self, batch, batch_idx):
            pass

    module = Segmenter()
    monitor = RobustnessMonitor(THREAT, ["pgd"], ignore_index=255, through="model")
    (values,) = quiet_trainer(callbacks=[monitor]).validate(module, masks(), verbose=False)
    result = evaluate(module.net, masks(), THREAT, ignore_index=255, progress=False)
    assert result.values == {key[4:]: value for key, value in values.items() if key.startswith("val/")}
    assert result.samples["pixels"].tolist() == [56] * 6
    assert "label" not in result.samples
    assert result.samples["robust_right"].mean().item() == pytest.approx(result.robust_acc)
    assert 0 < result.robust_acc < result.clean_acc
    # The interval is that of six images and not of 336 pixels.
    low, high = result.intervals["robust_acc"]
    assert high - low > 0.4


@dataclass
class Nested:
    data: dict
    index: int


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda x, y: [x, y], {}),
        (lambda x, y: {"input_values": x, "digit": y}, {"inputs": "input_values", "labels": "digit"}),
        (lambda x, y: Nested({"picture": x, "digit": y}, 3), {"inputs": "data.picture", "labels": "data.digit"}),
        (lambda x, y: ((x, torch.zeros(3)), {"y": y}), {"inputs": (0, 0), "labels": "1.y"}),
    ],
    ids=["list", "named", "nested", "paths"],
)
def test_batches_of_any_format(plain, pack, names):
    same(evaluated((pack(*batch) for batch in digits_loaders()[1]), **names), plain)


def test_outputs_are_picked(plain):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained_classifier().net

        def forward(self, x):
            return {"scores": [self.net(x)], "other": x}

    result = evaluated(digits_loaders()[1], Wrapped(), outputs=lambda found: found["scores"][0])
    assert result.values == plain.values


# ------------------------------------------------------------------------------------------------- wrapped models


@pytest.mark.parametrize("features", ["penultimate", "hidden"])
def test_a_compiled_model(features):
    torch._dynamo.reset()
    compiled = torch.compile(trained_classifier().net, backend="eager")
    with torch._dynamo.config.patch(cache_size_limit=64):
        result = evaluated(digits_loaders()[1], compiled, features=features)
    same(result, evaluated(digits_loaders()[1], features=features))


def test_a_model_that_fabric_has_set_up(plain):
    model = Fabric(accelerator="cpu", devices=1).setup(trained_classifier().net)
    same(evaluated(digits_loaders()[1], model), plain)
    named = evaluated(digits_loaders()[1], model, features="hidden")
    assert named.values == evaluated(digits_loaders()[1], features="hidden").values


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fabrics_precision_is_used(precision):
    dtypes = set()

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained_classifier().net

        def forward(self, x):
            outputs = self.net(x)
            dtypes.add(outputs.dtype)
            return outputs

    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(Recording())
    result = evaluated(digits_loaders()[1], model)
    assert dtypes == {torch.bfloat16}
    monitor = RobustnessMonitor(THREAT, ATTACKS)
    trainer = quiet_trainer(callbacks=[monitor], precision=precision)
    (values,) = trainer.validate(trained_classifier(), digits_loaders()[1], verbose=False)
    assert result.values == {
        key[4:]: value for key, value in values.items() if key.startswith("val/") and key != "val/loss"
    }


def test_autocast_around_the_call_is_used():
    with torch.autocast("cpu", torch.bfloat16):
        result = evaluated(digits_loaders()[1])
    trainer = quiet_trainer(callbacks=[RobustnessMonitor(THREAT, ATTACKS)], precision="bf16-mixed")
    (values,) = trainer.validate(trained_classifier(), digits_loaders()[1], verbose=False)
    assert result.robust_acc == values["val/robust_acc"]


def test_a_lightning_module_and_a_model_in_training(plain):
    same(evaluated(digits_loaders()[1], trained_classifier().train()), plain)


def test_a_model_that_needs_whole_batches_gets_them():
    model = Attending(trained_classifier().net)
    with pytest.warns(UserWarning, match="not run on parts of a batch"):
        result = evaluated(digits_loaders()[1], model)
    assert model.sizes == {16, 32}  # 16 in the look at the first batch
    assert result.robust_acc < result.clean_acc


def test_a_model_without_parameters(plain):
    weights = trained_classifier().net
    weights.requires_grad_(False)

    class Function(nn.Module):
        def forward(self, x):
            return weights(x)

    assert evaluated(digits_loaders()[1], Function(), features="outputs").robust_acc == plain.robust_acc


def test_batches_are_moved_to_the_model_or_to_the_device():
    class Far(nn.Module):
        """Stands on another device, which the meta device plays."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, x):
            places.add(x.device.type)
            raise ConnectionError

    for options, expected in (({}, "meta"), ({"device": "cpu"}, "cpu")):
        places, model = set(), Far()
        with pytest.raises((ConnectionError, RuntimeError, NotImplementedError)):
            evaluate(
                model, digits_loaders()[1], ThreatModel(bounds=None, eps=0.1, norm="l2"), progress=False, **options
            )
        assert places <= {expected}
        assert model.weight.device.type == "meta"
        if expected == "cpu":
            assert places


# ------------------------------------------------------------------------------------------- surroundings and loader


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(plain, context):
    model = trained_classifier().net
    with context():
        loader = [tuple(each.clone() for each in batch) for batch in digits_loaders()[1]]
        assert loader[0][0].is_inference() == (context is torch.inference_mode)
        same(evaluated(loader, model), plain)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)


def test_no_batch_is_loaded_in_vain():
    taken = []

    def batches():
        for batch in digits_loaders()[1]:
            taken.append(len(batch))
            yield batch

    evaluated(batches(), max_batches=2)
    assert len(taken) == 2


def test_a_slow_attack_shows_a_bar(capfd, monkeypatch):
    monkeypatch.setattr("lightning_wdefense.evaluation.progress.DELAY", 0.0)
    monkeypatch.setattr("lightning_wdefense.evaluation.progress.tqdm", functools.partial(tqdm, mininterval=0))
    batches = list(digits_loaders()[1])
    evaluate(trained_classifier().net, batches, THREAT, ["fgsm"], epsilons=[0.05])
    shown = capfd.readouterr().err
    assert "/32 left in the batch" in shown
    assert "/8 " in shown  # one attack at two values of eps, on each of four batches
    evaluate(trained_classifier().net, iter(batches), THREAT, [FGSM(THREAT)])  # of unknown length
    assert "/32 left in the batch" in capfd.readouterr().err
    evaluate(trained_classifier().net, batches, THREAT, ["fgsm"], progress=False)
    assert not capfd.readouterr().err


def test_a_headless_module_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="forward"):
        evaluated(digits_loaders()[1], HeadlessDigitsClassifier())
