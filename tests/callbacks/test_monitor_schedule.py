"""When RobustnessMonitor measures, and that what ModelCheckpoint and EarlyStopping monitor is always there."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer, trained_classifier

from lightning_wdefense import RobustnessMonitor, ThreatModel
from lightning_wdefense.attacks import FGSM

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.05)


class CountingFGSM(FGSM):
    """Counts the batches it attacks."""

    def perturb(self, problem):
        self.__dict__["calls"] = self.calls + 1
        return super().perturb(problem)

    @property
    def calls(self) -> int:
        return self.__dict__.get("calls", 0)


class History(L.Callback):
    """What was logged, and how many batches were attacked by then, at the end of each validation."""

    def __init__(self, attack: FGSM) -> None:
        self.attack, self.epochs, self.values, self.calls = attack, [], [], []

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.epochs.append(trainer.current_epoch)
            self.values.append(trainer.callback_metrics.get("val/robust_acc"))
            self.calls.append(self.attack.calls)

    @property
    def measured(self) -> list[int]:
        """The epoch of each validation in which batches were attacked."""
        before = [0, *self.calls[:-1]]
        return [epoch for epoch, was, now in zip(self.epochs, before, self.calls, strict=True) if now > was]


def fit(module=None, callbacks=(), ckpt_path=None, history=None, **options):
    torch.manual_seed(0)  # a network that classifies nothing right has nothing to attack
    attack = CountingFGSM(THREAT)
    monitor = RobustnessMonitor(THREAT, [attack], every_n_epochs=options.pop("every_n_epochs", 1), features=None)
    history = History(attack)
    trainer = quiet_trainer(callbacks=[monitor, *callbacks, history], limit_train_batches=2, **options)
    trainer.fit(module or DigitsClassifier(), *digits_loaders(val_size=64), ckpt_path=ckpt_path)
    return trainer, history


def test_every_validation_of_a_fit():
    _, history = fit(max_epochs=2, val_check_interval=0.5)
    assert history.measured == [0, 0, 1, 1]
    assert all(value is not None for value in history.values)


def test_sanity_checking_is_left_alone():
    _, history = fit(max_epochs=1, num_sanity_val_steps=2)
    assert history.calls == [2]  # the two batches of the one validation


def test_skipped_epochs_log_the_last_value_again():
    trainer, history = fit(max_epochs=5, every_n_epochs=2)
    assert history.measured == [0, 2, 4]
    assert history.values[1] == history.values[0]
    assert history.values[3] == history.values[2]
    assert "val/clean_acc" in trainer.callback_metrics


@pytest.mark.parametrize(("every", "check", "expected"), [(2, 2, [1, 3, 5, 7]), (5, 2, [1, 7]), (3, 3, [2, 5])])
def test_validation_that_is_itself_rare(every, check, expected):
    _, history = fit(max_epochs=8, every_n_epochs=every, check_val_every_n_epoch=check)
    assert history.measured == expected
    assert all(value is not None for value in history.values)


def test_a_second_validation_in_a_measured_epoch_is_measured():
    _, history = fit(max_epochs=3, every_n_epochs=2, val_check_interval=0.5)
    assert history.measured == [0, 0, 2, 2]


def test_validate_and_test_always_measure():
    attack = CountingFGSM(THREAT)
    trainer = quiet_trainer(callbacks=[RobustnessMonitor(THREAT, [attack], every_n_epochs=100)])
    module, loader = trained_classifier(), digits_loaders(val_size=32)[1]
    for count, evaluate in enumerate((trainer.validate, trainer.test, trainer.validate), 1):
        evaluate(module, loader, verbose=False)
        assert attack.calls == count


def test_fast_dev_run():
    _, history = fit(fast_dev_run=True)
    assert history.calls == [1]
    assert history.values[0] is not None


def test_no_validation_at_all():
    trainer, history = fit(limit_val_batches=0)
    assert history.calls == []
    assert "val/robust_acc" not in trainer.callback_metrics


def test_checkpoint_and_early_stopping_never_miss_a_key_also_after_resuming(tmp_path):
    def guards():
        return [
            EarlyStopping("val/robust_acc", mode="max", patience=100, strict=True),
            ModelCheckpoint(tmp_path, "{epoch}", monitor="val/robust_acc", mode="max", save_top_k=-1),
        ]

    _, whole = fit(seeded(), guards(), max_epochs=7, every_n_epochs=3, enable_checkpointing=True)
    assert whole.measured == [0, 3, 6]
    # Stopped in the middle of a skipped stretch: the epochs 5 and 6 are as they were.
    _, resumed = fit(
        seeded(), guards(), tmp_path / "epoch=4.ckpt", max_epochs=7, every_n_epochs=3, enable_checkpointing=True
    )
    assert resumed.epochs == [5, 6]
    assert resumed.measured == [6]
    assert resumed.values[0] == whole.values[5]


def seeded() -> DigitsClassifier:
    L.seed_everything(0, verbose=False)
    return DigitsClassifier()


class Forgetful(DigitsClassifier):
    """Learns well, and unlearns in its last epoch."""

    def on_train_epoch_start(self) -> None:
        last = self.trainer.current_epoch == self.trainer.max_epochs - 1
        self.optimizers().param_groups[0]["lr"] = 0.3 if last else 0.01


def test_model_checkpoint_picks_a_better_epoch_than_the_last(tmp_path):
    torch.manual_seed(0)
    best = ModelCheckpoint(tmp_path, monitor="val/robust_acc", mode="max")
    monitor = RobustnessMonitor(THREAT, ["fgsm", "pgd"])
    trainer = quiet_trainer(callbacks=[monitor, best], max_epochs=5, enable_checkpointing=True)
    loaders, module = digits_loaders(), Forgetful()
    trainer.fit(module, *loaders)

    def robust_accuracy(module: DigitsClassifier) -> float:
        trainer = quiet_trainer(callbacks=[RobustnessMonitor(THREAT, ["fgsm", "pgd"])])
        return trainer.validate(module, loaders[1], verbose=False)[0]["val/robust_acc"]

    chosen = robust_accuracy(Forgetful.load_from_checkpoint(best.best_model_path))
    assert chosen == best.best_model_score.item()
    assert chosen > robust_accuracy(module) + 0.2


def test_early_stopping_sees_that_robustness_no_longer_grows():
    stopping = EarlyStopping("val/robust_acc", mode="max", patience=1)
    module = DigitsClassifier(learning_rate=0.0)
    trainer = quiet_trainer(callbacks=[RobustnessMonitor(THREAT, ["fgsm"]), stopping], max_epochs=10)
    trainer.fit(module, *digits_loaders())
    assert stopping.stopped_epoch == 1


def test_a_second_fit_starts_anew():
    torch.manual_seed(0)  # a network that classifies nothing right has nothing to attack
    attack = CountingFGSM(THREAT)
    monitor = RobustnessMonitor(THREAT, [attack], every_n_epochs=10)
    for count in (1, 2):
        trainer = quiet_trainer(callbacks=[monitor], limit_train_batches=1, max_epochs=3)
        trainer.fit(DigitsClassifier(), *digits_loaders(val_size=32))
        assert attack.calls == count
