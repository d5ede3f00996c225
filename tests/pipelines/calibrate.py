"""What adversarial training by hand gains, without our package: ``python tests/pipelines/calibrate.py [NAME ...]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines.attack import scores
from pipelines.report import chosen, quiet
from pipelines.training import ByHand, fit


def main(names: list[str]) -> None:
    quiet()
    heads = ("clean", "attacked", "by hand:", "attacked", "gain", "asked", "seconds", "by hand")
    print(f"{'pipeline':26}{'task':24}{''.join(f'{head:>10}' for head in heads)}")
    for pipeline in chosen(names):
        if pipeline.refused is not None:
            continue
        start = time.perf_counter()
        plain = fit(pipeline)
        middle = time.perf_counter()
        hand = fit(pipeline, ByHand(pipeline))
        end = time.perf_counter()
        (clean, robust), (hand_clean, hand_robust) = (scores(pipeline, run.module, run.loader) for run in (plain, hand))
        gain = pipeline.improvement(robust, hand_robust)
        values = (clean, robust, hand_clean, hand_robust, gain, pipeline.gain, middle - start, end - middle)
        print(f"{pipeline.name:26}{pipeline.task:24}{''.join(f'{value:10.3f}' for value in values)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
