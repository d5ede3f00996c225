"""Faults of what is measured under attack, by the monitors and by ``evaluate``."""

from __future__ import annotations

from faults.fault import Fault

MONITOR = "tests/callbacks/test_monitor.py::"

FAULTS = [
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
        "clean[result.attacked], moved[result.attacked]",
        "clean, moved",
        (f"{MONITOR}test_values_under_inference_mode",),
    ),
    Fault(
        "the recorder's hooks stay on the model",
        "evaluation/attacked_batch.py",
        "return [recorder.observe(batch.detach().clone()) for batch in batches]  # the model may work in place\n        finally:\n            recorder.detach()",
        "return [recorder.observe(batch.detach().clone()) for batch in batches]\n        finally:\n            pass",
        ("tests/callbacks/test_monitor_invisible.py",),
    ),
]
