"""Progress bars for long attacks, next to the trainer's own progress bar."""

from __future__ import annotations

import time
from typing import Any

from lightning_wdefense._compat import Trainer, is_a
from lightning_wdefense.evaluation.progress import DELAY, TqdmProgress


def attack_progress(trainer: Trainer, total: float, *, show: bool = True) -> TqdmProgress | RichProgress:
    """A progress bar over ``total`` attacks, which the caller closes. It is invisible if the trainer shows no bar.

    Lightning's ``RichProgressBar`` (its default if rich is installed) prints a new line for every update of another bar. With it,
    the attacks are a task of that bar.
    """
    bar = trainer.progress_bar_callback
    show = show and bar is not None and trainer.is_global_zero
    if show and is_a(bar, "RichProgressBar") and getattr(bar, "progress", None) is not None:
        return RichProgress(bar, total)
    return TqdmProgress(total, show)


class RichProgress:
    """A task of Lightning's ``RichProgressBar``."""

    def __init__(self, bar: Any, total: float) -> None:
        self._bar, self._progress, self._started = bar, bar.progress, time.monotonic()
        self._task = self._progress.add_task("Robustness", total=total, visible=False)

    def advance(self, status: str) -> None:
        """Another attack is done."""
        visible = time.monotonic() - self._started > DELAY
        self._progress.update(self._task, advance=1, visible=visible, description=f"Robustness ({status})")
        self._bar.refresh()

    def close(self) -> None:
        """Hide the task. It is not removed, because Lightning finds its own tasks by their position."""
        self._progress.update(self._task, visible=False)
        self._bar.refresh()
