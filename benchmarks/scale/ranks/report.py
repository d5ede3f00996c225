"""The tables of the benchmark of ranks."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.scale.ranks.traffic import cost
from benchmarks.shared.statistics import ratio_interval


def amount(number: float, unit: str = "B") -> str:
    """A number with a metric prefix."""
    for prefix in ("", "k", "M", "G", "T"):  # noqa: B007
        if number < 1000:
            break
        number /= 1000
    else:
        prefix = "P"
    return f"{number:.3g} {prefix}{unit}"


def ratio(seconds: list[float], to: list[float]) -> str:
    low, high = ratio_interval(seconds, to)
    return f"{statistics.median(seconds) / statistics.median(to):.2f} [{low:.2f}, {high:.2f}]"


def markdown(result: dict[str, Any], command: str) -> str:
    """The report."""
    steps, rows = result["steps"], result["rows"]
    lines = [
        "# Several ranks: time and traffic",
        "",
        f"`{command}`",
        "",
        f"hardware {result['hardware']} a rank, two ranks (gloo), torch {result['torch']}. Medians, ratios with 95% intervals.",
        "",
        "## A step of `class-transport`",
        "",
        "64 images a rank, PGD-3, a small CNN of 256 features. One rank trains alone while the other waits.",
        "",
        "| | median, ms | ratio to one rank (95%) | ratio to two ranks (95%) |",
        "|---|---|---|---|",
    ]
    for kind, seconds in steps.items():
        to = [ratio(seconds, steps[other]) for other in ("one rank", "two ranks")]
        lines.append(f"| {kind} | {1000 * statistics.median(seconds):.1f} | {to[0]} | {to[1]} |")
    lines += [
        "",
        "## One transport of all samples: whole on each rank, or with shared rows",
        "",
        "`class-transport` between the samples of both ranks, 64 features, with the gradient. Iterations and what a rank receives in them (an "
        "all-reduce as a ring sends it) are those of one solve without labels at relative blur 0.1, counted in the run and by the arithmetic of the next table.",
        "",
        "| points | whole, ms | shared, ms | shared / whole (95%) | iterations | received | by arithmetic |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, row in rows.items():
        whole, shared = (1000 * statistics.median(row[kind]) for kind in ("whole", "shared"))
        by_arithmetic = cost(2, int(n) // 2, 64, row["n_iter"]).shared_traffic
        lines.append(
            f"| {n} | {whole:.1f} | {shared:.1f} | {ratio(row['shared'], row['whole'])} | {row['n_iter']} | {amount(row['bytes'])} | "
            f"{amount(by_arithmetic)} |"
        )
    lines += [
        "",
        "## On paper",
        "",
        "What `gather=True` costs each rank a step with 128 samples of 512 features a rank, one transport of 40 iterations. **Arithmetic, not "
        "run.** Whole: each rank solves the whole problem. Shared: each computes its own rows.",
        "",
        "| ranks | points | features received | whole: entries | whole: operations | shared: entries | shared: operations | shared: "
        "received in the iterations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["paper"].items():
        ranks = int(name.split(" ")[0])
        lines.append(
            f"| {ranks} | {128 * ranks} | {amount(row['gathered'])} | {amount(row['whole_entries'], '')} | "
            f"{amount(row['whole_operations'], '')} | {amount(row['shared_entries'], '')} | {amount(row['shared_operations'], '')} | "
            f"{amount(row['shared_traffic'])} |"
        )
    return "\n".join(lines) + "\n"
