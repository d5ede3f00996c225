"""The user's own metric under attack is what an attack that is not ours finds."""

from __future__ import annotations

import lightning as L
import pytest
from pipelines.pipeline import Pipeline
from pipelines.runs import FIRST, MONITORED, over, plain, plain_scores, require
from support.lightning_modules import quiet_trainer

from lightning_wdefense import RobustnessMonitor


def monitored(pipeline: Pipeline) -> dict[str, float]:
    """What a validation of the trained plain module logs with the monitor."""
    run = plain(pipeline.name)
    L.seed_everything(0, verbose=False)
    module = pipeline.make()
    module.load_state_dict(run.module.state_dict())
    arguments = pipeline.arguments if pipeline.monitor_arguments is None else pipeline.monitor_arguments
    trainer = quiet_trainer(**pipeline.trainer, callbacks=[RobustnessMonitor(pipeline.threat, **arguments)])
    trainer.validate(module, run.val, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


@over(MONITORED, [*FIRST, "normalised_in_step", "metric_compute", "arcface"])
def test_own_metric_under_attack(pipeline: Pipeline) -> None:
    require(pipeline)
    clean, robust = plain_scores(pipeline.name)
    by_module = float(plain(pipeline.name).logged[pipeline.metric])
    assert by_module == pytest.approx(clean, rel=1e-4), "the score by hand is not what the module logs without us"
    logged = monitored(pipeline)
    measured = logged[f"robust/{pipeline.metric}"]
    assert abs(logged[pipeline.metric] - clean) <= 1e-4 * max(abs(clean), 1), "the monitor changes the clean metric"
    assert pipeline.improvement(measured, clean) > 0
    assert pipeline.agrees(measured, robust), f"{measured:.4f} by the monitor, {robust:.4f} by hand"
