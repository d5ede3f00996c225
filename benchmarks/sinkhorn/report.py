"""The tables and the plot."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.shared.files import replacing
from benchmarks.sinkhorn.problems import VALUE_TARGET


def time_report(records: list[dict[str, Any]]) -> str:
    """One line for each problem, blur and target."""
    names = [
        name for name in dict.fromkeys(name for r in records for name in r["sides"]) if not name.startswith("ours")
    ]
    peers = [name for name in names if "fixed" not in records[-1]["sides"].get(name, {})]
    header = ["problem", "blur", "gradient", "ours, ms (10% to 90%)", "ours default, ms (error)", *peers]
    lines = [[*header, "geomloss default, ms (error)", "iterations", "MiB"]]
    for record in records:
        everyone = record["sides"]
        for target, ours in everyone["ours"].items():
            lines.append(
                [
                    record["row"]["name"],
                    f"{record['row']['relative_blur']:g}",
                    f"{float(target):.0e}",
                    f"{_milliseconds(ours)} ({ours['p10']:.3g} to {ours['p90']:.3g})"
                    if "ms" in ours
                    else _milliseconds(ours),
                    _with_error(everyone.get("ours default")),
                    *(_against(everyone.get(name, {}).get(target), ours) for name in peers),
                    _with_error(everyone.get("geomloss default")),
                    f"{statistics.median(record['ours_n_iter']):g}",
                    f"{record['ours_peak_mib']:.3g}",
                ]
            )
    return (
        "Milliseconds of a call with the fastest setting whose gradient error (relative, both clouds) meets the target "
        f"and whose value error is at most {VALUE_TARGET:g}, on all seeds; in brackets how many times ours. `MISS`: no "
        "setting did before calls took too long, in brackets the least gradient error. Blur is relative to the root "
        f"of the mean cost. Iterations and memory are those of our default settings.\n\n{_table(lines)}"
    )


def _milliseconds(trial: dict[str, Any]) -> str:
    return f"{trial['ms']:.3g}" if "ms" in trial else f"MISS ({trial['errors']['gradient']:.1e})"


def _against(trial: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    ratio = f" ({trial['ms'] / ours['ms']:.2g}×)" if trial and "ms" in trial and "ms" in ours else ""
    return _milliseconds(trial) + ratio if trial else "–"


def _with_error(side: dict[str, dict[str, Any]] | None) -> str:
    return f"{side['fixed'].get('ms', math.nan):.3g} ({side['fixed']['errors']['gradient']:.1e})" if side else "–"


def robustness_report(records: list[dict[str, Any]]) -> str:
    lines = [
        ["problem", "blur", "problems", "converged", "violations", "gradient: median, 90%, max", "value", "reference"]
    ]
    for r in records:
        spread = (", ".join(f"{number:.0e}" for number in r[name].values()) for name in ("gradient", "value"))
        row = (
            r["row"]["name"],
            f"{r['row']['relative_blur']:g}",
            str(r["problems"]),
            f"{r['converged'] / r['problems']:.0%}",
        )
        lines.append([*row, str(r["violations"]), *spread, f"{r['worst_reference']:.0e}"])
    problems, converged, violations = (sum(r[key] for r in records) for key in ("problems", "converged", "violations"))
    return (
        f"{problems} problems at default settings in float32: {converged} converged by their own account, {violations} "
        f"have a gradient error above 1e-2 or a value error above {VALUE_TARGET:g}. `reference` is the marginal error "
        f"that the worst of the references was left with.\n\n{_table(lines)}"
    )


def _table(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time against the number of points on the single adversarial problems, one panel for each blur and target."""
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for r in records for name in r["sides"]))
    blurs = list(dict.fromkeys(r["row"]["relative_blur"] for r in records))
    targets = list(dict.fromkeys(target for r in records for target in r["sides"]["ours"]))
    figure, axes = plt.subplots(
        len(targets),
        len(blurs),
        figsize=(5 * len(blurs), 4 * len(targets)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (i, target), (j, blur) in ((t, b) for t in enumerate(targets) for b in enumerate(blurs)):
        of_blur = [r for r in records if r["row"]["relative_blur"] == blur]
        shown = sorted((r for r in of_blur if r["row"]["family"] == "adv" and r["row"]["batch"] == 1), key=_size)
        for k, name in enumerate(names):
            trials = [(_size(r)[0], r["sides"].get(name, {}).get(target, {})) for r in shown]
            points = [(n, trial["ms"]) for n, trial in trials if "ms" in trial]
            if points:
                axes[i, j].loglog(
                    *zip(*points, strict=True), "o-", label=name, color=f"C{k}", lw=3 if name == "ours" else 1.5
                )
        axes[i, j].set(title=f"blur {blur:g}, gradient error {float(target):.0e}", xlabel="points", ylabel="ms")
        axes[i, j].grid(alpha=0.3)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles) or 1)
    with replacing(path) as file:
        figure.savefig(file, dpi=120)
    plt.close(figure)


def _size(record: dict[str, Any]) -> tuple[int, int]:
    return record["row"]["n"], record["row"]["d"]
