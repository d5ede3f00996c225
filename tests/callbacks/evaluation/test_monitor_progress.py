"""Long attacks show how far they are; short ones are silent."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from packaging.version import Version
from support.lightning_modules import digits_loaders, quiet_trainer, trained_classifier

from lightning_wdefense import RobustnessMonitor, ThreatModel
from lightning_wdefense.attacks import FGSM
from lightning_wdefense.callbacks.evaluation import progress

pytestmark = pytest.mark.filterwarnings("ignore")
rich_bar = pytest.mark.skipif(
    Version(L.__version__) < Version("2.5.3") and Version(version("rich")) >= Version("14.1"),
    reason="the bar of Lightning before 2.5.3 fails with Rich 14.1 and later, whatever the callbacks",
)

THREAT = ThreatModel(eps=0.1)


class Clock:
    """Stands still but for slow attacks, however busy the machine is."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@dataclass(frozen=True)
class Slow(FGSM):
    def perturb(self, problem):
        CLOCK.now += 0.6 * progress.DELAY
        return super().perturb(problem)


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=CLOCK))
    monkeypatch.setattr("tqdm.std.time", CLOCK)


def evaluate(attack, bar=None, enable=True, **options) -> None:
    monitor = RobustnessMonitor(THREAT, {"slow": attack}, features=None, **options)
    callbacks = [monitor] if bar is None else [monitor, bar]
    trainer = quiet_trainer(callbacks=callbacks, enable_progress_bar=enable)
    trainer.validate(trained_classifier(), digits_loaders()[1], verbose=False)


def test_a_slow_attack_shows_a_bar_and_what_is_left(capfd):
    evaluate(Slow(THREAT), TQDMProgressBar())
    shown = capfd.readouterr().err
    assert "robustness" in shown
    assert "slow: " in shown
    assert "/32 left in the batch" in shown
    assert "/4 " in shown  # one attack on each of four batches


def test_the_total_counts_the_attacks_of_the_curve(capfd):
    evaluate(Slow(THREAT), TQDMProgressBar(), epsilons=[0.05, 0.1], max_batches=2)
    assert "4/4 " in capfd.readouterr().err  # two batches at 0.1 and at 0.05


@pytest.mark.parametrize(
    ("attack", "options", "enable"),
    [(FGSM(THREAT), {}, True), (Slow(THREAT), {"progress": False}, True), (Slow(THREAT), {}, False)],
    ids=["fast", "progress=False", "enable_progress_bar=False"],
)
def test_nothing_is_shown(capfd, attack, options, enable):
    evaluate(attack, TQDMProgressBar() if enable else None, enable, **options)
    assert "robustness" not in "".join(capfd.readouterr()).lower()


@rich_bar
def test_rich_progress_bar_gets_a_task_of_its_own(capfd):
    bar = RichProgressBar()
    evaluate(Slow(THREAT), bar)
    (task,) = (task for task in bar.progress.tasks if task.description.startswith("Robustness"))
    assert task.completed == task.total == 4
    assert "left in the batch" in task.description
    assert not task.visible  # it was, while it ran:
    assert task.finished
    assert "robustness:" not in "".join(capfd.readouterr())  # no bar of tqdm's between the lines


@rich_bar
def test_rich_progress_bar_over_several_epochs_keeps_its_own_tasks():
    bar = RichProgressBar()
    trainer = quiet_trainer(
        callbacks=[RobustnessMonitor(THREAT, {"slow": Slow(THREAT)}), bar], enable_progress_bar=True, max_epochs=2
    )
    trainer.fit(trained_classifier(), *digits_loaders(batch_size=64))
    assert bar.train_progress_bar.description.startswith("Epoch 1/1")
