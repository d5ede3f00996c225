"""What adversarial training by hand gains, without our package: ``python tests/pipelines/calibrate.py [NAME ...]``."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from pipelines.attack import scores
from pipelines.table import PIPELINES
from pipelines.training import ByHand, fit


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(
        f"{'pipeline':24}{'task':22}{'logged':>8}{'clean':>8}{'robust':>8}{'by hand:':>10}{'robust':>8}{'gain':>8}{'margin':>8}{'s':>6}{'s':>6}"
    )
    for pipeline in PIPELINES:
        if pipeline.refused or (names and not any(name in f"{pipeline.name} {pipeline.task}" for name in names)):
            continue
        start = time.perf_counter()
        plain = fit(pipeline)
        middle = time.perf_counter()
        hand = fit(pipeline, ByHand(pipeline))
        end = time.perf_counter()
        (clean, robust), (hand_clean, hand_robust) = (scores(pipeline, run.module, run.loader) for run in (plain, hand))
        logged = float(plain.logged.get(pipeline.metric, torch.nan)) if pipeline.metric else float("nan")
        values = (
            logged,
            clean,
            robust,
            hand_clean,
            hand_robust,
            pipeline.improvement(robust, hand_robust),
            pipeline.gain,
        )
        columns = "".join(f"{value:{width}.3f}" for value, width in zip(values, (8, 8, 8, 10, 8, 8, 8), strict=True))
        print(f"{pipeline.name:24}{pipeline.task:22}{columns}{middle - start:6.1f}{end - middle:6.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
