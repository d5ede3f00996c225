"""Untouched pipelines become robust, as an attack that is not ours measures."""

from __future__ import annotations

from dataclasses import replace

import torch
from pipelines.attack import scores
from pipelines.pipeline import Pipeline
from pipelines.runs import DEFENDABLE, over, plain, require
from pipelines.training import Run, fit

from lightning_wdefense import WassersteinDefense


def defended(pipeline: Pipeline, recipe: tuple[str, ...] = ("pgd-at",), **options: object) -> Run:
    """The pipeline trained by the callback, or by its own mixin."""
    if pipeline.defended is not None:
        return fit(pipeline, by_mixin=True, **options)
    return fit(
        pipeline, WassersteinDefense(*recipe, threat=pipeline.threat, warmup_epochs=1, **pipeline.arguments), **options
    )


@over(DEFENDABLE)
def test_gain(pipeline: Pipeline) -> None:
    require(pipeline)
    before, after = (scores(pipeline, run.module, run.loader)[1] for run in (plain(pipeline.name), defended(pipeline)))
    assert pipeline.improvement(before, after) >= pipeline.gain, f"{before:.3f} -> {after:.3f}"


@over(DEFENDABLE)
def test_default_recipe_runs(pipeline: Pipeline) -> None:
    require(pipeline)
    run = defended(replace(pipeline, epochs=1), recipe=(), limit_train_batches=3, limit_val_batches=1)
    assert run.trainer.state.finished
    assert all(weight.isfinite().all() for weight in run.module.state_dict().values() if torch.is_tensor(weight))
