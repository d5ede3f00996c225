"""Logs pictures to the loggers that can show them: Weights & Biases and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_wdefense._compat import Trainer, is_a, rank_zero_warn
from lightning_wdefense.callbacks.schedule import logged_step
from lightning_wdefense.metrics import AccuracyCurve

Picture = np.ndarray
"""An RGB picture ``(H, W, 3)`` in uint8."""


def shows_pictures(trainer: Trainer) -> bool:
    """Whether a logger of this trainer can show pictures."""
    return trainer.is_global_zero and any(
        is_a(it, "WandbLogger") or is_a(it, "TensorBoardLogger") for it in trainer.loggers
    )


def log_pictures(trainer: Trainer, key: str, pictures: Sequence[Picture], captions: Sequence[str]) -> None:
    """Log pictures under ``key``, at the step at which Lightning logs metrics now. Other loggers are skipped.

    W&B shows the captions under the pictures. TensorBoard has no captions, so it gets them as text.
    """
    if not trainer.is_global_zero:
        return
    step = logged_step(trainer)
    for logger in trainer.loggers:
        if is_a(logger, "WandbLogger"):
            logger.log_image(key, list(pictures), step=step, caption=list(captions))  # type: ignore[attr-defined]
        elif is_a(logger, "TensorBoardLogger"):
            for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                tag = key if len(pictures) == 1 else f"{key}/{index}"
                logger.experiment.add_image(tag, picture, step, dataformats="HWC")  # type: ignore[attr-defined]
                logger.experiment.add_text(f"{tag}/caption", caption, step)  # type: ignore[attr-defined]


def log_curve(trainer: Trainer, key: str, curve: AccuracyCurve) -> None:
    """Plot accuracy against eps and log the picture, if a logger can show it and matplotlib is installed."""
    if not shows_pictures(trainer):
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        rank_zero_warn(
            'The robustness curve is not drawn, because matplotlib is missing: pip install "lightning-wdefense[plot]".'
        )
        return
    # Not through pyplot, which would keep the figure and may open a window.
    canvas = FigureCanvasAgg(figure := Figure(figsize=(5, 4), layout="constrained"))
    curve.plot(figure.subplots())
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    log_pictures(trainer, key, [picture], [f"AUAC {float(curve.auac):.3f}"])
