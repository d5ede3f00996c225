"""Faults of what is measured under attack, by the monitors and by ``evaluate``."""

from __future__ import annotations

from faults.fault import Fault

MONITOR = "tests/callbacks/test_monitor.py::"
EVALUATE = "tests/evaluation/test_evaluate.py::"
RESULT = "tests/evaluation/test_result.py::"

DISTANCES = "tests/evaluation/test_distances.py::"

FAULTS = [
    # ------------------------------------------------------------------------------ distances
    Fault(
        "what the attacks found does not count as a distance",
        "evaluation/distances.py",
        "torch.where(fooled, torch.minimum(found, moved.clamp_max(threat.eps)), found)",
        "found",
        (f"{DISTANCES}test_curve_agrees_with_the_attacks_at_eps",),
    ),
    Fault(
        "the distributional accuracy is the pointwise one",
        "evaluation/distances.py",
        "distributional_accuracy(distances, [threat.eps], p=p)",
        "distributional_accuracy(distances, [threat.eps], p=torch.inf)",
        (f"{DISTANCES}test_values_by_hand",),
    ),
    Fault(
        "a distance of exactly eps stands at eps",
        "metrics/distributional.py",
        "places = torch.tensor((0.0, *radii), dtype=dtype).double()",
        "places = torch.tensor((0.0, *radii), dtype=torch.float64)",
        (f"{DISTANCES}test_curve_agrees_with_the_attacks_at_eps",),
    ),
    # ------------------------------------------------------------------------------ what both measure by
    Fault(
        "the curve attacks what has fallen",
        "evaluation/protocol.py",
        "run(attacks, samples=left.flatten(1).any(1) if left.ndim > 1 else left)",
        "run(attacks)",
        (f"{MONITOR}test_curve_attacks_only_what_stands",),
    ),
    Fault(
        "success is that of the first attack",
        "evaluation/protocol.py",
        "measures.success.update(result.clean, result.worst, result.labels)",
        "measures.success.update(result.clean, next(iter(result.adversarial.values())), result.labels)",
        (f"{MONITOR}test_values_under_inference_mode",),
    ),
    Fault(
        "the shift counts samples that were not attacked",
        "evaluation/protocol.py",
        "measures.add_shift(clean[right], moved[right])",
        "measures.add_shift(clean, moved)",
        (f"{MONITOR}test_values_under_inference_mode",),
    ),
    Fault(
        "the recorder's hooks stay on the model",
        "evaluation/attacked_batch.py",
        "return [recorder.observe(batch.detach().clone()) for batch in batches]  # the model may work in place\n        finally:\n            recorder.detach()",
        "return [recorder.observe(batch.detach().clone()) for batch in batches]\n        finally:\n            pass",
        ("tests/callbacks/test_monitor_invisible.py",),
    ),
    # ------------------------------------------------------------------------------------ without a Trainer
    Fault(
        "every batch gets the same noise",
        "evaluation/evaluate.py",
        "self._seed, 0, index, self._rank)",
        "self._seed, 0, 0, self._rank)",
        (f"{EVALUATE}test_values_are_those_of_the_monitor_to_the_bit",),
    ),
    Fault(
        "all ranks of evaluate draw the same noise",
        "evaluation/evaluate.py",
        "torch.distributed.get_rank() if self._several else 0",
        "0",
        ("tests/evaluation/test_ranks.py",),
    ),
    Fault(
        "the numbers that the loader drew are gone",
        "evaluation/evaluate.py",
        "            random_state.restore()\n",
        "",
        ("tests/evaluation/test_invisible.py",),
    ),
    Fault(
        "parts of batches run where samples depend on each other",
        "evaluation/evaluate.py",
        "accepts_partial_batches=not self._whole)",
        "accepts_partial_batches=True)",
        (f"{EVALUATE}test_a_model_that_needs_whole_batches_gets_them",),
    ),
    Fault(
        "a batch too many is loaded",
        "evaluation/evaluate.py",
        "in enumerate(islice(loader, max_batches)):",
        "in enumerate(islice(loader, max_batches and max_batches + 1)):",
        (f"{EVALUATE}test_no_batch_is_loaded_in_vain",),
    ),
    Fault(
        "Fabric's precision is forgotten",
        "modules/parallel.py",
        "return model._strategy.precision",
        "return None",
        (f"{EVALUATE}test_fabrics_precision_is_used",),
    ),
    Fault(
        "a sample that fell rises again",
        "evaluation/samples.py",
        "left = left & (predicted == labels)",
        "left = clean_right & (predicted == labels)",
        (f"{RESULT}test_independent_attacks_break_in_the_given_order",),
    ),
    Fault(
        "the interval forgets the size of the sample",
        "evaluation/intervals.py",
        "(1 + square / count)\n    half",
        "1\n    half",
        (f"{RESULT}test_interval_is_scipys",),
    ),
    Fault(
        "images without a label count in the interval",
        "evaluation/result.py",
        'int(self.samples["clean_right"].isfinite().sum())',
        'len(self.samples["clean_right"])',
        (f"{RESULT}test_pixels_of_a_mask",),
    ),
]
