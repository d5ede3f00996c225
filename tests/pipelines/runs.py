"""Trainings that several tests look at."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
from pipelines.attack import scores
from pipelines.pipeline import Pipeline
from pipelines.table import PIPELINES
from pipelines.training import Run, fit

BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}
DEFENDABLE = [pipeline for pipeline in PIPELINES if pipeline.refused is None]
MONITORED = [pipeline for pipeline in DEFENDABLE if pipeline.metric is not None]
REFUSED = [pipeline for pipeline in PIPELINES if pipeline.refused is not None]
FIRST = {pipeline.task: pipeline.name for pipeline in reversed(DEFENDABLE)}.values()
"""The first of each task, which stands for it in the tests that train for long."""


def over(pipelines: list[Pipeline], quick: Iterable[str] | None = None) -> pytest.MarkDecorator:
    """The test, for each of the pipelines; marked as slow for all but those named in ``quick``."""
    slow = {pipeline.name for pipeline in pipelines} - set(BY_NAME if quick is None else quick)
    rows = [
        pytest.param(pipeline, id=pipeline.name, marks=pytest.mark.slow if pipeline.name in slow else ())
        for pipeline in pipelines
    ]
    return pytest.mark.parametrize("pipeline", rows)


def require(pipeline: Pipeline) -> None:
    """Skip where a package is missing."""
    if pipeline.needs is not None:
        pytest.importorskip(pipeline.needs)


@functools.cache
def plain(name: str) -> Run:
    """The pipeline trained without us. Leave it as it is."""
    return fit(BY_NAME[name])


@functools.cache
def plain_scores(name: str) -> tuple[float, float]:
    """Its score on clean inputs and under the tests' own attack."""
    return scores(BY_NAME[name], plain(name).module, plain(name).loader)
