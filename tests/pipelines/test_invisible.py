"""With nothing to train against, we leave no trace: weights, logs, metrics and random state are those of a run without us."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from pipelines.pipeline import Pipeline
from pipelines.runs import DEFENDABLE, FIRST, over, require
from pipelines.training import fit
from torch import Tensor
from torchmetrics import Metric

from lightning_wdefense import RobustnessMonitor, WassersteinDefense

OURS = ("robust/", "defense/", "val/")


def trace(pipeline: Pipeline, *callbacks: L.Callback) -> dict[str, Any]:
    """All that a training leaves behind."""
    run = fit(pipeline, *callbacks, max_epochs=2, limit_train_batches=3)
    module = run.module
    metrics = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
    return {
        "weights": dict(module.state_dict()),
        "buffers": dict(module.named_buffers()),
        "metrics": {name: (metric.metric_state, metric._update_count) for name, metric in metrics.items()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "attributes": {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (list, dict, int, Tensor)) and key[0] != "_"
        },
        "logged": {key: value for key, value in run.logged.items() if not key.startswith(OURS)},
        "random": torch.get_rng_state(),
    }


KEEPING = ("appends_outputs", "metric_collection", "metric_compute", "dropout_batchnorm", "mean_teacher", "byol")
"""They have more than weights that could change."""


@over([pipeline for pipeline in DEFENDABLE if pipeline.defended is None], [*FIRST, *KEEPING])
def test_standard_recipe_and_monitor_leave_no_trace(pipeline: Pipeline) -> None:
    require(pipeline)
    monitor_arguments = pipeline.arguments if pipeline.monitor_arguments is None else pipeline.monitor_arguments
    alone = trace(pipeline)
    watched = trace(
        pipeline,
        WassersteinDefense("standard", threat=pipeline.threat, **pipeline.arguments),
        RobustnessMonitor(pipeline.threat, **monitor_arguments),
    )
    for part, expected in alone.items():
        assert same(watched[part], expected), part


def same(first: Any, second: Any) -> bool:
    """Bit for bit, in nested containers."""
    if isinstance(first, Tensor):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and torch.equal(first.nan_to_num(7.25), second.nan_to_num(7.25))
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)
