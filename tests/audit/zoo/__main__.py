"""Prints which broken defences the audit catches, and which honest ones it fails: ``PYTHONPATH=tests python -m audit.zoo``."""

from __future__ import annotations

import argparse
import time

import torch
from audit.zoo.exhibits import BROKEN, HONEST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="audit only the exhibits whose names contain one of these words")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    counts = {True: [0, 0], False: [0, 0]}
    for exhibit in BROKEN + HONEST:
        if options.names and not any(name in exhibit.name for name in options.names):
            continue
        for seed in range(options.seeds):
            report = exhibit.audit(seed, options.samples)
            right = exhibit.told_apart(report)
            counts[exhibit.broken][0] += right
            counts[exhibit.broken][1] += 1
            said = ", ".join(report.failed) or report.verdict
            accuracies = f"claimed {report.robust_acc:.0%}, audited {report.audited_acc:.0%}"
            print(
                f"{'' if right else 'WRONG: '}{exhibit.name}: {said} ({accuracies}, {report.seconds:.1f} s)", flush=True
            )
            if options.names:
                print(report)
    caught, honest = counts[True], counts[False]
    print(
        f"caught {caught[0]} of {caught[1]} broken defences; false alarms on {honest[1] - honest[0]} of {honest[1]} honest ones"
    )
    print(f"{time.perf_counter() - begin:.0f} s, {options.threads} threads, training included")


if __name__ == "__main__":
    main()
