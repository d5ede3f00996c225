"""Faults of the metrics: what counts as right, over which samples, and how states add up."""

from __future__ import annotations

from faults.fault import Fault

ALL = "tests/metrics/test_all_metrics.py::"
ACCURACY = "tests/metrics/test_accuracy.py::"
CURVE = "tests/metrics/test_curve.py::"
DISTRIBUTIONAL = "tests/metrics/test_distributional.py::"
SENSITIVITY = "tests/metrics/test_sensitivity.py::"
DETECTABILITY = "tests/metrics/test_detectability.py::"

FAULTS = [
    Fault(
        "robust against one attack is robust",
        "metrics/accuracy.py",
        "torch.stack([clean, *left.values()]).all(0)",
        "torch.stack([clean, *left.values()]).any(0)",
        (f"{ACCURACY}test_robust_is_the_worst_case",),
    ),
    Fault(
        "what is wrong on clean inputs may be right under an attack",
        "metrics/accuracy.py",
        "name: clean & is_correct(",
        "name: is_correct(",
        (f"{ACCURACY}test_against_a_loop_and_scikit_learn",),
    ),
    Fault(
        "a later update replaces the count",
        "metrics/accuracy.py",
        "setattr(self, _STATE + name, getattr(self, _STATE + name) + count)",
        "setattr(self, _STATE + name, count)",
        (f"{ALL}test_batches_add_up_to_one_update_on_everything",),
    ),
    Fault(
        "success counts what was wrong before",
        "metrics/success.py",
        "fooled = right & ~is_correct(",
        "fooled = ~is_correct(",
        (f"{ACCURACY}test_success_rate_is_what_robust_accuracy_lost",),
    ),
    Fault(
        "the curve may rise",
        "metrics/curve.py",
        "list(accumulate(right, torch.logical_and))",
        "right",
        (f"{CURVE}test_curve_never_rises_and_bounds_its_area",),
    ),
    Fault(
        "the area is not divided by the largest radius",
        "metrics/curve.py",
        "torch.trapezoid(values, budgets) / budgets[-1]",
        "torch.trapezoid(values, budgets)",
        (f"{CURVE}test_against_numpy_and_scikit_learn",),
    ),
    Fault(
        "ranks do not add their totals",
        "metrics/curve.py",
        'self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")',
        'self.add_state("total", torch.tensor(0), dist_reduce_fx="max")',
        (f"{ALL}test_merge_state", f"{ALL}test_two_processes_give_the_value_on_the_union"),
    ),
    Fault(
        "one half is class 1",
        "metrics/_predictions.py",
        "classes = (target > 0.5).long()",
        "classes = (target >= 0.5).long()",
        ("tests/metrics/test_predictions.py",),
    ),
    Fault(
        "a binary logit is a probability",
        "metrics/_predictions.py",
        ".gt(0).long()",
        ".gt(0.5).long()",
        ("tests/metrics/test_predictions.py",),
    ),
    Fault(
        "the interval is one-sided",
        "metrics/detectability.py",
        "[(1 - confidence) / 2, (1 + confidence) / 2]",
        "[1 - confidence, confidence]",
        (f"{DETECTABILITY}test_interval_is_that_of_scipys_bootstrap",),
    ),
    Fault(
        "ties of the bootstrap count nothing",
        "metrics/detectability.py",
        "- 0.5 * counts",
        "- counts",
        (f"{DETECTABILITY}test_extremes",),
    ),
    Fault(
        "the bootstrap ignores the seed",
        "metrics/detectability.py",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(0)",
        (f"{DETECTABILITY}test_seed_decides_and_neither_order_nor_the_global_state_does",),
    ),
    Fault(
        "the shift keeps more pairs than it may",
        "metrics/shift.py",
        "room = self.max_samples - held",
        "room = self.max_samples",
        ("tests/metrics/test_shift.py::test_keeps_the_first_pairs_only",),
    ),
    Fault(
        "the distributional adversary starts with the dearest samples",
        "metrics/distributional.py",
        "distances, order = distances.sort()",
        "distances, order = distances.sort(descending=True)",
        (f"{DISTRIBUTIONAL}test_is_the_optimum_of_the_linear_program",),
    ),
    Fault(
        "no sample is split",
        "metrics/distributional.py",
        "fooled = fooled + torch.minimum(rest / costs[whole], weights[whole])",
        "pass",
        (f"{DISTRIBUTIONAL}test_the_last_sample_is_split",),
    ),
    Fault(
        "weights stay behind when distances are sorted",
        "metrics/distributional.py",
        "weights = weights[order] / weights.sum()",
        "weights = weights / weights.sum()",
        (f"{DISTRIBUTIONAL}test_is_the_optimum_of_the_linear_program",),
    ),
    Fault(
        "powers are taken in data units",
        "metrics/distributional.py",
        """    costs = (distances / radius).pow(p)
    spent = (weights * costs).cumsum(0)
    whole = int((spent <= 1).sum())""",
        """    costs = distances.pow(p) / radius**p
    spent = (weights * costs).cumsum(0)
    whole = int((spent <= 1).sum())""",
        (f"{DISTRIBUTIONAL}test_a_huge_order_is_the_pointwise_accuracy",),
    ),
    Fault(
        "the metric ignores its weights",
        "metrics/distributional.py",
        "self.weights.append(weights.to(torch.float32, copy=True))",
        "self.weights.append(torch.ones_like(distances, dtype=torch.float32))",
        (f"{DISTRIBUTIONAL}test_weights_are_1_where_none_are_given",),
    ),
    Fault(
        "the sensitivity measures gradients in the norm of the perturbations",
        "metrics/sensitivity.py",
        "BALLS[norm].dual(",
        "BALLS[norm].length(",
        (f"{SENSITIVITY}test_is_exact_for_a_linear_loss",),
    ),
    Fault(
        "the sensitivity takes the order of the ball for its conjugate",
        "metrics/sensitivity.py",
        "else p / (p - 1)",
        "else p",
        (f"{SENSITIVITY}test_is_exact_for_a_linear_loss",),
    ),
]
