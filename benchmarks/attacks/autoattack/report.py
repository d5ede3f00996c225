"""The figures as a page."""

from __future__ import annotations

from typing import Any


def report(result: dict[str, Any]) -> str:
    """Markdown: accuracies and verdicts, then seconds."""
    about = result["environment"]
    lines = [
        "# AutoAttack: ours, torchattacks' parts and the official code\n",
        f"`{about['command']}`, on {about['hardware']}, torch {about['torch']}, torchattacks {about['torchattacks']}. One core, one run.\n",
        "Per cent of the images that each part leaves, after the ones before it; `other verdicts`: images on which a side's final verdict "
        "is not ours. `CPU` and `wall`: seconds; `ratio`: our CPU time divided by this side's.\n",
        "| model | side | clean | APGD-CE | APGD-T | FAB-T | Square: robust | other verdicts | CPU | wall | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["models"]:
        own = row["sides"]["ours"]
        for side, each in row["sides"].items():
            shown = [*each["left"].values(), each["other_verdicts"], each["cpu_s"], each["wall_s"]]
            ratio = f"{own['cpu_s'] / each['cpu_s']:.2f}" if each["cpu_s"] else ""
            lines.append(
                f"| {row['model']} ({row['images']} images) | {side} | {row['clean']} | {' | '.join(map(str, shown))} | {ratio} |"
            )
    lines += [
        "\nCPU seconds of each part:\n",
        "| model | side | APGD-CE | APGD-T | FAB-T | Square |",
        "| --- " * 6 + "|",
    ]
    for row in result["models"]:
        for side, each in row["sides"].items():
            lines.append(
                f"| {row['model']} | {side} | {' | '.join(str(p['cpu_s']) for p in each['seconds'].values())} |"
            )
    return "\n".join(lines) + "\n"
