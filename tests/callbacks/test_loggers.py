"""What arrives at the loggers, read back from their files."""

from __future__ import annotations

import sys

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from support.lightning_modules import digits_loaders, quiet_trainer, trained_classifier
from support.logs import tensorboard_history, tensorboard_picture_steps, tensorboard_scalar_steps, wandb_history

from lightning_wdefense import AdversarialExampleLogger, RobustnessMonitor, ThreatModel
from lightning_wdefense._compat import dataloader_suffix

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
METRICS = {"clean_acc", "robust_acc", "robust_acc_fgsm", "attack_success", "auac", "transport_shift"}


def watch(logger, stage="fit", **options):
    callbacks = [
        RobustnessMonitor(THREAT, ["fgsm"], epsilons=[0.05, 0.1]),
        AdversarialExampleLogger(THREAT, "fgsm", samples=3, class_names=[f"digit {it}" for it in range(10)]),
    ]
    trainer = quiet_trainer(callbacks=callbacks, logger=logger, log_every_n_steps=1, limit_train_batches=3, **options)
    loaders = digits_loaders(val_size=64)
    module = trained_classifier()
    getattr(trainer, stage)(module, *(loaders if stage == "fit" else loaders[1:]))
    return trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One run with both loggers, and what each of them kept."""
    import wandb

    directory = tmp_path_factory.mktemp("both")
    loggers = [
        WandbLogger(project="tests", save_dir=directory, offline=True),
        TensorBoardLogger(directory, name="board"),
    ]
    trainer = watch(loggers, max_epochs=2)
    wandb.finish()
    loggers[1].finalize("success")
    return trainer, wandb_history(directory), tensorboard_history(loggers[1].log_dir)


def test_metrics_arrive(both):
    trainer, wandb, board = both
    for key in (f"val/{metric}" for metric in METRICS):
        assert wandb[key] == pytest.approx(trainer.callback_metrics[key].item())
        assert board[key] == pytest.approx(trainer.callback_metrics[key].item())


def test_the_curve_arrives_as_a_picture(both):
    trainer, wandb, board = both
    ((picture, caption),) = wandb["val/robustness_curve"]
    assert picture.shape == (400, 500, 3)
    assert picture.std() > 5  # something is drawn
    assert caption == f"AUAC {trainer.callback_metrics['val/auac']:.3f}"
    assert (board["val/robustness_curve"] == picture).all()
    assert board["val/robustness_curve/caption"] == caption


def test_the_panel_of_examples_arrives_with_captions(both):
    _, wandb, board = both
    panel = wandb["val/adversarial_examples"]
    assert len(panel) == 3
    labels = next(iter(digits_loaders()[1]))[1].tolist()
    for index, (picture, caption) in enumerate(panel):
        assert caption.startswith(f"label digit {labels[index]}; clean: digit ")
        assert "; attacked: digit " in caption
        assert caption.endswith("%)")
        assert (board[f"val/adversarial_examples/{index}"] == picture).all()
        assert board[f"val/adversarial_examples/{index}/caption"] == caption


def test_pictures_are_logged_at_the_step_of_the_metrics(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    watch(logger, max_epochs=2)
    logger.finalize("success")
    for tag in ("val/robustness_curve", "val/adversarial_examples/0"):
        assert (
            tensorboard_picture_steps(logger.log_dir, tag)
            == tensorboard_scalar_steps(logger.log_dir, "val/auac")
            == [2, 5]
        )


def test_pictures_of_a_test_run(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    watch(logger, stage="test")
    logger.finalize("success")
    found = tensorboard_history(logger.log_dir)
    assert {"test/robustness_curve", "test/adversarial_examples/0", "test/robust_acc"} <= set(found)


def test_several_dataloaders_draw_several_curves(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(callbacks=[RobustnessMonitor(THREAT, ["fgsm"], epsilons=[0.1])], logger=logger)
    trainer.validate(trained_classifier(), [digits_loaders(val_size=32)[1]] * 2, verbose=False)
    logger.finalize("success")
    found = tensorboard_history(logger.log_dir)
    assert {f"val/robustness_curve{dataloader_suffix(index)}" for index in (0, 1)} <= set(found)


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_other_loggers_get_the_numbers_and_nothing_breaks(tmp_path, kind):
    logger = CSVLogger(tmp_path) if kind == "csv" else False
    trainer = watch(logger)
    assert {f"val/{metric}" for metric in METRICS} <= set(trainer.callback_metrics)
    if logger:
        logger.finalize("success")
        header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
        assert {f"val/{metric}" for metric in METRICS} <= set(header.split(","))


def test_without_matplotlib_the_curve_is_left_out_with_a_warning(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(
        UserWarning, match=r"not drawn, because matplotlib is missing: pip install \"lightning-wdefense\[plot\]\""
    ):
        watch(logger, stage="validate")
    logger.finalize("success")
    found = tensorboard_history(logger.log_dir)
    assert "val/auac" in found
    assert "val/adversarial_examples/0" in found
    assert "val/robustness_curve" not in found


def test_drawing_leaves_the_users_figures_alone(tmp_path):
    from matplotlib import pyplot

    figure = pyplot.figure()
    before = pyplot.get_fignums()  # other tests may have left theirs open
    try:
        watch(TensorBoardLogger(tmp_path), stage="validate")
        assert pyplot.get_fignums() == before
        assert pyplot.gcf() is figure
    finally:
        pyplot.close(figure)
