"""The matrix in one table, by our callbacks: ``python tests/pipelines/summary.py [NAME ...]``."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines.attack import scores
from pipelines.pipeline import Pipeline
from pipelines.report import chosen, quiet
from pipelines.runs import plain
from pipelines.test_defended import adversarial, defended
from pipelines.test_monitored import monitored

UNTOUCHED, SAID, REFUSED = "untouched", "after one argument", "refused"


def verdict(pipeline: Pipeline) -> tuple[str, str]:
    """How the pipeline works, and the numbers."""
    if pipeline.refused is not None:
        return refusal(pipeline)
    run = plain(pipeline.name)
    clean, before = scores(pipeline, run.module, run.loader)
    _, after = (
        scores(pipeline, other.module, other.loader) for other in (run, defended(pipeline, adversarial(pipeline)))
    )
    gain, numbers = pipeline.improvement(before, after[1]), f"{clean:9.3f}{before:9.3f}{after[1]:9.3f}"
    failures = [] if gain >= pipeline.gain else [f"gain {gain:.3f} below {pipeline.gain}"]
    if pipeline.metric is not None:
        measured = monitored(pipeline).get(f"robust/{pipeline.metric}", float("nan"))
        numbers += f"{measured:9.3f}"
        failures += [] if pipeline.agrees(measured, before) else ["the monitor disagrees"]
    works = SAID if pipeline.arguments or pipeline.defended else UNTOUCHED
    return ("FAILED", f"{numbers}  {', '.join(failures)}") if failures else (works, numbers)


def refusal(pipeline: Pipeline) -> tuple[str, str]:
    """Whether it is refused with the words that help."""
    try:
        defended(pipeline, adversarial(pipeline))
    except Exception as error:
        said = f"  {type(error).__name__}: {str(error)[:90]!r}"
        return (REFUSED if re.search(pipeline.refused, str(error)) else "FAILED"), said
    return "FAILED", "  not refused"


def main(names: list[str]) -> None:
    quiet()
    counts: Counter[str] = Counter()
    print(f"{'pipeline':26}{'task':24}{'how':20}{'clean':>9}{'attacked':>9}{'defended':>9}{'monitor':>9}")
    for pipeline in chosen(names):
        try:
            how, rest = verdict(pipeline)
        except Exception as error:
            how, rest = "FAILED", f"  {type(error).__name__}: {str(error)[:90]!r}"
        counts[how] += 1
        print(f"{pipeline.name:26}{pipeline.task:24}{how:20}{rest}", flush=True)
    print(", ".join(f"{count} {how}" for how, count in counts.most_common()))


if __name__ == "__main__":
    main(sys.argv[1:])
