"""AdversarialExampleLogger: the pictures are right to the pixel, and come when they should."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer, trained_classifier, unpack
from support.logs import tensorboard_picture_steps
from torch import nn

from lightning_wdefense import AdversarialExampleLogger, ThreatModel
from lightning_wdefense.attacks import PGD
from lightning_wdefense.callbacks import examples
from lightning_wdefense.callbacks.examples import MIN_SIDE, side_by_side

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)


@pytest.fixture
def shown(monkeypatch):
    """Every call that would send pictures to a logger."""
    calls = []

    def log_pictures(trainer, key, pictures, captions):
        calls.append(SimpleNamespace(epoch=trainer.current_epoch, key=key, pictures=pictures, captions=captions))

    monkeypatch.setattr(examples, "shows_pictures", lambda trainer: True)
    monkeypatch.setattr(examples, "log_pictures", log_pictures)
    return calls


def panels(picture: np.ndarray, side: int) -> list[np.ndarray]:
    """The three parts of a picture, one value a pixel of the original."""
    height, width, channels = picture.shape
    assert channels == 3
    assert picture.dtype == np.uint8
    factor = height // side
    assert height == factor * side
    gap = (width - 3 * factor * side) // 2
    starts = [index * (factor * side + gap) for index in range(3)]
    for start in starts[1:]:
        assert (picture[:, start - gap : start] == 255).all()
    parts = [picture[:, start : start + factor * side] for start in starts]
    for part in parts:  # enlarged by repeating pixels
        small = part[::factor, ::factor]
        assert (part == small.repeat(factor, 0).repeat(factor, 1)).all()
    return [part[::factor, ::factor] for part in parts]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
@pytest.mark.parametrize("side", [8, 32, 100])
def test_pixels(channels, bounds, side):
    low, high = bounds
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, channels, side, side, generator=generator) * (high - low) + low
    delta = torch.rand(2, channels, side, side, generator=generator) * 0.2 - 0.1
    attacked = (clean + delta).clamp(low, high)
    threat = ThreatModel(eps=0.1, bounds=bounds)
    for index, picture in enumerate(side_by_side(clean, attacked, threat)):
        assert picture.shape[0] >= min(MIN_SIDE, side)
        change = attacked[index] - clean[index]
        expected = [
            (clean[index] - low) / (high - low),
            (attacked[index] - low) / (high - low),
            0.5 + change / (2 * change.abs().max()),
        ]
        for part, values in zip(panels(picture, side), expected, strict=True):
            values = values[:3].permute(1, 2, 0).expand(-1, -1, 3).numpy()
            np.testing.assert_allclose(part, values * 255, atol=0.51)


def test_no_perturbation_is_grey_and_no_bounds_take_the_images_range():
    clean = torch.linspace(-2, 6, 64).reshape(1, 1, 8, 8)
    (picture,) = side_by_side(clean, clean, ThreatModel(eps=0.1, bounds=None))
    first, second, third = panels(picture, 8)
    assert (first.min(), first.max()) == (0, 255)
    assert (first == second).all()
    assert set(np.unique(third)) <= {127, 128}


def test_what_is_shown_is_what_the_attack_did(shown):
    mean, std = 0.3, 0.4

    class Normalising(DigitsClassifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            inputs, labels = unpack(batch)
            return (inputs - mean) / std, labels

        def forward(self, x):
            return super().forward(x * std + mean)

    module = Normalising()
    module.load_state_dict(trained_classifier().state_dict())
    threat = ThreatModel(eps=0.1, mean=mean, std=std)
    attack = PGD(threat, steps=3, random_start=False)
    logger = AdversarialExampleLogger(threat, attack, samples=4)
    loader = digits_loaders()[1]
    quiet_trainer(callbacks=[logger]).validate(module, loader, verbose=False)
    (call,) = shown
    assert call.key == "val/adversarial_examples"
    assert len(call.pictures) == len(call.captions) == 4

    inputs, labels = (part[:4] for part in next(iter(loader)))
    attacked = PGD(THREAT, steps=3, random_start=False)(trained_classifier().eval(), inputs, labels)
    with torch.no_grad():
        before, after = (trained_classifier().eval()(it).softmax(1).max(1) for it in (inputs, attacked))
    for index, (picture, caption) in enumerate(zip(call.pictures, call.captions, strict=True)):
        first, second, _ = panels(picture, 8)
        np.testing.assert_allclose(first[..., 0], inputs[index, 0] * 255, atol=0.51)
        np.testing.assert_allclose(second[..., 0], attacked[index, 0] * 255, atol=0.6)
        assert caption == (
            f"label {labels[index]}; clean: {before.indices[index]} ({before.values[index]:.0%}); "
            f"attacked: {after.indices[index]} ({after.values[index]:.0%})"
        )


def test_class_names(shown):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    logger = AdversarialExampleLogger(THREAT, samples=1, class_names=names)
    quiet_trainer(callbacks=[logger]).test(trained_classifier(), digits_loaders()[1], verbose=False)
    label = int(next(iter(digits_loaders()[1]))[1][0])
    assert shown[0].key == "test/adversarial_examples"
    assert shown[0].captions[0].startswith(f"label {names[label]}; clean: ")


def fit(logger, **options):
    trainer = quiet_trainer(callbacks=[logger], limit_train_batches=1, **options)
    trainer.fit(DigitsClassifier(), *digits_loaders(val_size=64))
    return trainer


@pytest.mark.parametrize(
    ("every", "check", "expected"), [(1, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [0, 2, 4]), (3, 3, [2, 5]), (2, 3, [2, 5])]
)
def test_every_n_epochs(shown, every, check, expected):
    fit(AdversarialExampleLogger(THREAT, every_n_epochs=every), max_epochs=6, check_val_every_n_epoch=check)
    assert [call.epoch for call in shown] == expected


def test_evaluation_after_training_is_always_shown(shown):
    logger = AdversarialExampleLogger(THREAT, every_n_epochs=10)
    trainer = fit(logger, max_epochs=3)
    trainer.validate(DigitsClassifier(), digits_loaders()[1], verbose=False)
    trainer.test(DigitsClassifier(), digits_loaders()[1], verbose=False)
    assert [call.key.split("/")[0] for call in shown] == ["val", "val", "test"]


def test_one_panel_for_several_dataloaders_and_small_batches(shown):
    loaders = [digits_loaders(batch_size=3)[1], digits_loaders(batch_size=5)[1]]
    logger = AdversarialExampleLogger(THREAT, samples=8)
    quiet_trainer(callbacks=[logger]).validate(trained_classifier(), loaders, verbose=False)
    (call,) = shown
    assert len(call.pictures) == 3


def test_inputs_that_are_no_images_are_skipped_with_a_warning(shown):
    class Tabular(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0].flatten(1), batch[1]

    with pytest.warns(UserWarning, match=r"images \(N, C, H, W\).*shape \(32, 64\) are not shown"):
        quiet_trainer(callbacks=[AdversarialExampleLogger(THREAT)]).validate(
            Tabular(), digits_loaders()[1], verbose=False
        )
    assert shown == []


def test_nothing_is_attacked_where_no_logger_shows_pictures():
    class Refuses(PGD):
        def perturb(self, problem):
            raise AssertionError

    logger = AdversarialExampleLogger(THREAT, Refuses(THREAT))
    quiet_trainer(callbacks=[logger]).validate(trained_classifier(), digits_loaders()[1], verbose=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(tmp_path, precision):
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(callbacks=[AdversarialExampleLogger(THREAT)], logger=logger, precision=precision)
    trainer.validate(trained_classifier(), digits_loaders()[1], verbose=False)
    logger.finalize("success")
    assert tensorboard_picture_steps(logger.log_dir, "val/adversarial_examples/0") == [0]


@pytest.mark.parametrize(("sanity", "epochs"), [(1, 0), (0, 1)])
def test_too_few_class_names_are_told_before_the_first_epoch_if_they_can_be(tmp_path, sanity, epochs):
    class Counting(DigitsClassifier):
        begun = 0

        def on_train_epoch_start(self):
            self.begun += 1

    names = [f"digit {it}" for it in range(9)]
    callback = AdversarialExampleLogger(THREAT, "fgsm", class_names=names)
    trainer = quiet_trainer(
        callbacks=[callback], logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=sanity, limit_train_batches=1
    )
    with pytest.raises(ValueError, match="class_names has 9 names, but there are at least 10 classes"):
        trainer.fit(module := Counting(), *digits_loaders(val_size=32))
    assert module.begun == epochs
    assert callback._class(8) == "digit 8"
    with pytest.raises(ValueError, match="class_names has 9 names"):
        callback._class(9)
