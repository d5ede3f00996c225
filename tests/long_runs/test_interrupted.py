"""A checkpoint that is written in the middle of a batch is of the state before it: the resumed run repeats the batch."""

from __future__ import annotations

import functools
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from long_runs.job import AFTER, BATCHES, CASES, EPOCHS, INTERRUPTED, MOMENTS, Run, assert_goes_on

QUICK = {
    ("udr", "optimizer step"),
    ("critic", "training step"),
    ("trades+awp", "before backward"),
    ("pgd-at", "attack"),
}
INTERRUPTIONS = [
    pytest.param(case, moment, marks=() if (case, moment) in QUICK else pytest.mark.slow)
    for case in CASES
    for moment in MOMENTS
]
"""Each kind of recipe and each kind of moment once; all pairs of them among the slow tests."""


class InterruptionError(Exception):
    pass


@functools.cache
def whole(case):
    """What an uninterrupted training leaves."""
    return Run(case, None).fit().left()


def fail():
    raise InterruptionError


def send(*signals):
    for each in signals:
        os.kill(os.getpid(), each)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """The variables of a job of SLURM's, and a ``scontrol`` that writes down how it was called."""
    variables = {"JOB_ID": "4321", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/requeued"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(("case", "moment"), INTERRUPTIONS)
def test_after_an_exception(case, moment, tmp_path):
    run = Run(case, tmp_path, moment, fail, callbacks=(OnExceptionCheckpoint(tmp_path),))
    with pytest.raises(InterruptionError):
        run.fit()
    checkpoint = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["WassersteinDefense(None)"]["batches"] == INTERRUPTED
    assert_goes_on(Run(case, tmp_path).fit(tmp_path / "on_exception.ckpt", seed=9).left(), whole(case), INTERRUPTED)


@pytest.mark.parametrize(("case", "moment"), INTERRUPTIONS)
def test_requeued_by_a_signal_in_the_batch(case, moment, slurm):
    """The signal asks for a checkpoint at that very moment, and the training goes on until the other signal ends it."""
    run = Run(case, slurm, moment, lambda: send(signal.SIGUSR1, signal.SIGTERM), slurm=True)
    with pytest.raises(SIGTERMException):
        run.fit()
    assert (slurm / "requeued").read_text() == "requeue 4321\n"
    # The batch in which the checkpoint was written has ended as if nothing had happened.
    assert run.logged.eps == {batch: eps for batch, eps in whole(case)["eps"].items() if batch <= INTERRUPTED}
    assert_goes_on(Run(case, slurm).fit("hpc", seed=9).left(), whole(case), INTERRUPTED)


@pytest.mark.parametrize("case", ["critic+awp", pytest.param("udr", marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", AFTER)
def test_requeued_by_a_signal_after_the_batch(case, moment, slurm):
    """A validation that was interrupted begins anew: Lightning alone would skip it, or measure its first batches only."""
    run = Run(case, slurm, moment, lambda: send(signal.SIGUSR1, signal.SIGTERM), slurm=True)
    with pytest.raises(SIGTERMException):
        run.fit()
    assert_goes_on(Run(case, slurm).fit("hpc", seed=9).left(), whole(case), AFTER[moment])


@pytest.mark.parametrize("how", ["signal", pytest.param("exception", marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", ["attack", "validation", "measurement"])
def test_ended_without_slurm(how, moment, tmp_path):
    """After the signal Lightning ends the batch and raises an exception."""
    case, happens = "udr", fail if how == "exception" else lambda: send(signal.SIGTERM)
    run = Run(case, tmp_path, moment, happens, callbacks=(OnExceptionCheckpoint(tmp_path),))
    with pytest.raises(InterruptionError if how == "exception" else SIGTERMException):
        run.fit()
    first = AFTER.get(moment, INTERRUPTED + (how == "signal"))
    assert_goes_on(Run(case, tmp_path).fit(tmp_path / "on_exception.ckpt", seed=9).left(), whole(case), first)


LIGHTNING_REPEATS = (
    "After a resume in the middle of a batch Lightning's totals of begun and of processed batches differ by one, so that it repeats a batch "
    "at whose end a checkpoint was written."
)


@pytest.mark.parametrize(
    "second",
    ["attack", pytest.param("end of the batch", marks=pytest.mark.xfail(strict=True, reason=LIGHTNING_REPEATS))],
)
def test_requeued_twice(second, slurm):
    case, again = "critic+awp", INTERRUPTED + 4
    for moment, batch, ckpt_path in (("training step", INTERRUPTED, None), (second, again, "hpc")):
        run = Run(case, slurm, moment, lambda: send(signal.SIGUSR1, signal.SIGTERM), slurm=True, batch=batch)
        with pytest.raises(SIGTERMException):
            run.fit(ckpt_path)
    assert_goes_on(Run(case, slurm).fit("hpc", seed=9).left(), whole(case), again + (second == "end of the batch"))


@pytest.mark.parametrize(("moment", "same"), [("attack", True), ("before backward", False)])
def test_statistics_of_a_batch_that_is_run_twice(moment, same, tmp_path):
    """BatchNorm takes them in the step's own pass, with or without a defense; not in the attack, which runs in eval mode."""
    left = Run("pgd-at", tmp_path, batch_norm=True).fit().left()
    run = Run("pgd-at", tmp_path, moment, fail, batch_norm=True, callbacks=(OnExceptionCheckpoint(tmp_path),))
    with pytest.raises(InterruptionError):
        run.fit()
    resumed = Run("pgd-at", tmp_path, batch_norm=True).fit(tmp_path / "on_exception.ckpt", seed=9).left()
    assert (resumed["weights"]["net.norm.running_mean"] == left["weights"]["net.norm.running_mean"]) == same
    assert (resumed["weights"]["net.norm.num_batches_tracked"] == EPOCHS * BATCHES) == same
    assert resumed["learned"] == left["learned"]


def test_checkpoints_of_a_validation_that_has_ended(tmp_path):
    """Its values are in the checkpoint, and it is not run a second time."""
    when = {"monitor": "val/robust_acc", "save_top_k": -1, "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", **when)
    run = Run("pgd-at", tmp_path, callbacks=(saver,)).fit()
    assert_goes_on(Run("pgd-at", tmp_path).fit(tmp_path / "epoch=0.ckpt", seed=9).left(), run.left(), BATCHES)
