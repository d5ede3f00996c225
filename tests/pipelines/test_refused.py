"""What can't be defended is refused before anything is trained, with a word on what to do."""

from __future__ import annotations

import lightning as L
import pytest
from pipelines.pipeline import Pipeline
from pipelines.runs import REFUSED, over
from pipelines.training import fit

from lightning_wdefense import WassersteinDefense


class Steps(L.Callback):
    """Counts the steps of the optimizer."""

    taken = 0

    def on_before_optimizer_step(self, *args: object) -> None:
        self.taken += 1


@over(REFUSED)
def test_refused(pipeline: Pipeline) -> None:
    steps = Steps()
    defense = WassersteinDefense("pgd-at", threat=pipeline.threat, warmup_epochs=1, **pipeline.arguments)
    with pytest.raises(Exception, match=pipeline.refused):
        fit(pipeline, steps, defense)
    assert steps.taken == 0


@over(REFUSED)
def test_trains_without_us(pipeline: Pipeline) -> None:
    assert fit(pipeline, max_epochs=1).trainer.state.finished
