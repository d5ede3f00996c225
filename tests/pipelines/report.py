"""What the two tables share."""

from __future__ import annotations

import logging
import warnings
from importlib.util import find_spec

import torch
from pipelines.pipeline import Pipeline
from pipelines.table import PIPELINES


def quiet() -> None:
    """One thread, and no word from Lightning."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def chosen(names: list[str]) -> list[Pipeline]:
    """The pipelines whose name or task has one of these words, all if there are none."""
    there = [pipeline for pipeline in PIPELINES if pipeline.needs is None or find_spec(pipeline.needs)]
    return [one for one in there if not names or any(name in f"{one.name} {one.task}" for name in names)]
