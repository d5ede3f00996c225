"""Faults of reports, comparisons, and of what an evaluation keeps for them."""

from __future__ import annotations

from faults.fault import Fault

EXAMPLES = "tests/evaluation/test_examples.py::"
REPORT = "tests/audit/report/test_report.py::"
HTML = "tests/audit/report/test_html.py::"
PAIRED = "tests/audit/report/test_paired.py::"
COMPARISON = "tests/audit/report/test_comparison.py::"
TABLES = "tests/callbacks/evaluation/test_tables.py::"

FAULTS = [
    # ------------------------------------------------------------------------------ what an evaluation keeps
    Fault(
        "samples are ranked by their place in the batch where distances are equal",
        "evaluation/details/examples.py",
        "order = ranks[:, 1].argsort(stable=True)",
        "order = torch.arange(len(ranks), device=ranks.device)",
        (f"{EXAMPLES}test_ends_by_attack_and_margin",),
    ),
    Fault(
        "pictures are in model units",
        "evaluation/protocol.py",
        "pair = (threat.to_data(float32_or_better(inputs)) for inputs in (batch.inputs.detach(), result.inputs))",
        "pair = (float32_or_better(inputs) for inputs in (batch.inputs.detach(), result.inputs))",
        (f"{EXAMPLES}test_each_is_the_sample_that_its_row_says",),
    ),
    Fault(
        "batches without a right sample are not counted",
        "evaluation/protocol.py",
        "measures.examples.skip(len(result.labels))",
        "measures.examples.skip(0)",
        (f"{EXAMPLES}test_batches_without_a_right_sample_are_counted",),
    ),
    Fault(
        "rows of other processes are counted from 0",
        "evaluation/details/examples.py",
        "(seen.cumsum(0) - seen).repeat_interleave(",
        "(seen - seen).repeat_interleave(",
        (f"{EXAMPLES}test_several_processes_are_merged",),
    ),
    Fault(
        "the plan forgets the potentials",
        "evaluation/details/plan.py",
        "((solution.g - costs) / temperature)",
        "(-costs / temperature)",
        (f"{EXAMPLES}test_plan_is_that_of_an_exact_solver",),
    ),
    Fault(
        "confusion is transposed",
        "evaluation/details/classes.py",
        "labels[seen] * classes + worst[seen]",
        "worst[seen] * classes + labels[seen]",
        (f"{EXAMPLES}test_classes_are_torchmetrics",),
    ),
    # ------------------------------------------------------------------------------ reports
    Fault(
        "text of users is HTML",
        "audit/report/pages/html.py",
        "return _mark(cell) if isinstance(cell, Mark) else escape(cell)",
        "return _mark(cell) if isinstance(cell, Mark) else cell",
        (f"{HTML}test_text_of_users_stays_text",),
    ),
    Fault(
        "a failed write leaves one new file",
        "audit/report/storage.py",
        'place / f".{name}.{os.getpid()}"',
        "place / name",
        (f"{REPORT}test_a_report_is_never_half_written",),
    ),
    Fault(
        "infinite distances come back as the largest number",
        "audit/report/storage.py",
        "        return str(value)\n    return value if",
        "        return 3e38\n    return value if",
        (f"{REPORT}test_settings_of_any_kind",),
    ),
    Fault(
        "the difference is not amplified",
        "audit/report/pages/images.py",
        "0.5 + delta * factor / span",
        "0.5 + delta / span",
        (f"{HTML}test_the_difference_is_amplified_around_grey",),
    ),
    # ------------------------------------------------------------------------------ comparisons
    Fault(
        "the interval of the difference ignores that the samples are the same",
        "audit/report/paired.py",
        "phi = corrected / math.sqrt(margins) if margins else 0.0",
        "phi = 0.0 * corrected * margins",
        (f"{PAIRED}test_published_intervals",),
    ),
    Fault(
        "the p-value is one-sided",
        "audit/report/paired.py",
        "return min(1.0, 2 * tail / 2**count)",
        "return min(1.0, tail / 2**count)",
        (f"{PAIRED}test_mcnemar_is_a_fair_coin",),
    ),
    Fault(
        "models of other labels are compared",
        "audit/report/comparison.py",
        'for name in ("label", "pixels", "rank"):',
        'for name in ("pixels", "rank"):',
        (f"{COMPARISON}test_what_cannot_be_compared",),
    ),
    Fault(
        "columns of the comparison are swapped",
        "audit/report/sections/versus.py",
        "for key in (ROBUST, CLEAN):",
        "for key in (CLEAN, ROBUST):",
        (f"{COMPARISON}test_table",),
    ),
    # ------------------------------------------------------------------------------ tables of the monitor
    Fault(
        "classes of the second batch replace those of the first",
        "evaluation/details/classes.py",
        "_counts(*torch.cat([self._held(), found]).unbind(1)).flatten()",
        "found.flatten()",
        (f"{TABLES}test_counts_of_several_batches_and_processes",),
    ),
    Fault(
        "pixels count as independent samples",
        "callbacks/evaluation/tables.py",
        "_with_interval(robust, 0 if masks else count)",
        "_with_interval(robust, count)",
        (f"{TABLES}test_pixels_of_masks_have_no_interval",),
    ),
]
