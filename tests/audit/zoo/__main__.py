"""Which broken defences the audit catches, and which honest models it fails: ``PYTHONPATH=tests:. python -m audit.zoo``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from audit.zoo.exhibits import BROKEN, HONEST, Exhibit

from benchmarks.shared.machine import hardware
from lightning_wdefense.audit import AuditReport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="audit only the exhibits whose names contain one of these words")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the table there, as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin, rows = time.perf_counter(), []
    for exhibit in BROKEN + HONEST:
        if options.names and not any(name in exhibit.name for name in options.names):
            continue
        found = [exhibit.audit(seed, options.samples) for seed in range(options.seeds)]
        rows.append((exhibit, found))
        print(row(exhibit, found), flush=True)
        if options.names:
            print(*found, sep="\n\n")
    seconds = time.perf_counter() - begin
    right = {
        broken: [it.told_apart(each) for it, found in rows for each in found if it.broken == broken]
        for broken in (True, False)
    }
    sentence = (
        f"Caught {sum(right[True])} of {len(right[True])} broken defences; false alarms on {right[False].count(False)} of {len(right[False])} "
        f"honest models. {seconds:.0f} s, training included, on {hardware('cpu')}."
    )
    print(sentence)
    if options.output:
        options.output.write_text(page(options, sentence, rows))


def row(exhibit: Exhibit, found: list[AuditReport]) -> str:
    """A line of the table: the checks that failed for every seed, and the mean accuracies."""
    failed = [check for check in found[0].failed if all(check in each.failed for each in found)]
    said = ", ".join(failed) or "/".join(sorted({each.verdict for each in found}))
    claimed, audited = (
        sum(getattr(each, name) for each in found) / len(found) for name in ("robust_acc", "audited_acc")
    )
    right = sum(exhibit.told_apart(each) for each in found)
    seconds = sum(each.seconds for each in found) / len(found)
    kind = "broken" if exhibit.broken else "honest"
    return f"| {exhibit.name} | {kind} | {right} of {len(found)} | {said} | {claimed:.1%} | {audited:.1%} | {seconds:.1f} |"


def page(options: argparse.Namespace, sentence: str, rows: list[tuple[Exhibit, list[AuditReport]]]) -> str:
    head = [
        "# The audit on broken and on honest defences",
        f"`PYTHONPATH=tests:. python -m audit.zoo --seeds {options.seeds} --samples {options.samples} --threads {options.threads} --output FILE`, "
        f"torch {torch.__version__}. Digits, {options.samples} held-out samples, small networks, {options.seeds} seeds; "
        "L-infinity 0.15 unless the name says otherwise. A broken defence is told apart if the checks that name its fault fail, an honest model if none "
        "does. Checks: those that failed for every seed. Accuracies: means over the seeds, under the claim's attacks and under all that the "
        "audit tried.",
        sentence,
        "| model | kind | told apart | checks that failed | claimed | audited | seconds |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(row(exhibit, found) for exhibit, found in rows),
    ]
    return "\n\n".join(head) + "\n"


if __name__ == "__main__":
    main()
