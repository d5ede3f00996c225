"""Untouched pipelines become robust, as an attack that is not ours measures."""

from __future__ import annotations

from dataclasses import replace

import torch
from pipelines.attack import scores
from pipelines.pipeline import Pipeline
from pipelines.runs import DEFENDABLE, FIRST, over, plain_scores, require
from pipelines.training import Run, fit

from lightning_wdefense import Recipe, WassersteinDefense
from lightning_wdefense.attacks import PGD


def defended(pipeline: Pipeline, *recipe: str | Recipe, **options: object) -> Run:
    """The pipeline trained by the callback, with its own default if no recipe is given, or by its own mixin."""
    if pipeline.defended is not None:
        return fit(pipeline, by_mixin=True, **options)
    defense = WassersteinDefense(*recipe, threat=pipeline.threat, warmup_epochs=1, **pipeline.arguments)
    return fit(pipeline, defense, **options)


def adversarial(pipeline: Pipeline) -> Recipe:
    """Adversarial training with as many steps as the gains need."""
    return Recipe.named("pgd-at", pipeline.threat, attack=PGD(pipeline.threat, steps=4))


LONG = {"torchvision_detection", "segmentation_ignore", "ctc"}
"""They stand for their tasks in the other tests: a gain takes them 7 to 30 seconds."""


@over(DEFENDABLE, {*FIRST, "normalised_in_step"} - LONG)
def test_gain(pipeline: Pipeline) -> None:
    require(pipeline)
    clean, before = plain_scores(pipeline.name)
    assert pipeline.improvement(before, clean) > 0.1, "the tests' own attack does not hurt the plain module"
    run = defended(pipeline, adversarial(pipeline))
    _, after = scores(pipeline, run.module, run.loader)
    assert pipeline.improvement(before, after) >= pipeline.gain, f"{before:.3f} -> {after:.3f}"


@over(DEFENDABLE)
def test_default_recipe_runs(pipeline: Pipeline) -> None:
    require(pipeline)
    run = defended(replace(pipeline, epochs=1), limit_train_batches=2, limit_val_batches=1)
    assert run.trainer.state.finished
    assert all(weight.isfinite().all() for weight in run.module.state_dict().values() if torch.is_tensor(weight))
