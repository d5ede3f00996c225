"""The table of planted faults, a module or two for each folder of the package; read by ``planted_faults.py``."""

from faults import (
    attack_kinds,
    attacks,
    audit,
    callbacks,
    defenses,
    detection,
    evaluation,
    metrics,
    reports,
    resuming,
    steps,
    transport,
)
from faults.fault import Fault

FAULTS: list[Fault] = [
    *attacks.FAULTS,
    *attack_kinds.FAULTS,
    *audit.FAULTS,
    *callbacks.FAULTS,
    *defenses.FAULTS,
    *detection.FAULTS,
    *evaluation.FAULTS,
    *metrics.FAULTS,
    *reports.FAULTS,
    *resuming.FAULTS,
    *steps.FAULTS,
    *transport.FAULTS,
]

__all__ = ["FAULTS", "Fault"]
