"""The figures as a page."""

from __future__ import annotations

from typing import Any

SIDES = {
    "bare": "the attacks alone",
    "accuracies": "`evaluate(features=None)`",
    "and a file": "`evaluate(features=None, resume=...)`",
    "and the shift": "`evaluate(resume=...)`, with the transport shift of the features",
}


def report(result: dict[str, Any]) -> str:
    """Markdown: times and their ratios, then what was left after the kill."""
    about, killed = result["environment"], result["killed"]
    lines = [
        "# What `evaluate` costs beside its attacks\n",
        f"`{about['command']}`, on {about['hardware']}, torch {about['torch']}. {result['model']}: {result['images']} test images in "
        f"{result['batches']} batches. CPU seconds on one core, medians of {result['cost'][0]['turns']} runs that take turns; ratio to the attacks "
        "alone, with the 95% bootstrap interval of the ratio of medians.\n",
        "| attacks | | CPU s | ratio | interval |",
        "| --- " * 5 + "|",
    ]
    for row in result["cost"]:
        for side, text in SIDES.items():
            low, high = row["interval"][side]
            lines.append(
                f"| {row['attacks']} | {text} | {row['cpu_s'][side]} | {row['ratio'][side]} | {low} to {high} |"
            )
    yes = {True: "yes", False: "**no**"}
    lines += [
        "\n## Killed half-way\n",
        f"SIGKILL (exit status {killed['exit_status']}) with {killed['batches_kept']} of {result['batches']} batches finished, then started again: "
        f"{killed['attacks_after']} runs of an attack on a batch (expected for the batches that were not finished: "
        f"{killed['attacks_expected_after']}). Equal to the bit with an undisturbed run: values {yes[killed['same_values']]}, samples "
        f"{yes[killed['same_samples']]}, curve {yes[killed['same_curve']]}. The file has {killed['file_kb']} kB.",
    ]
    return "\n".join(lines) + "\n"
