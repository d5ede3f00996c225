"""The checks of an audit: functions from a case to a finding, by their names, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from lightning_wdefense.audit.case import Case
from lightning_wdefense.audit.checks.gradients import (
    finite_differences,
    rough_surface,
    straight_through,
    zero_gradients,
)
from lightning_wdefense.audit.checks.outputs import logits, randomness, saturated_logits, training_mode
from lightning_wdefense.audit.checks.planted import planted
from lightning_wdefense.audit.checks.radius import growing_eps, unbounded
from lightning_wdefense.audit.checks.rivals import black_box, single_step, stronger_attacks, transfer
from lightning_wdefense.audit.checks.settings import restarts, step_size, steps
from lightning_wdefense.audit.findings import Finding

CHECKS: dict[str, Callable[[Case], Finding]] = {
    "logits": logits,
    "training-mode": training_mode,
    "randomness": randomness,
    "saturated-logits": saturated_logits,
    "zero-gradients": zero_gradients,
    "finite-differences": finite_differences,
    "straight-through": straight_through,
    "rough-surface": rough_surface,
    "steps": steps,
    "step-size": step_size,
    "restarts": restarts,
    "stronger-attacks": stronger_attacks,
    "single-step": single_step,
    "black-box": black_box,
    "transfer": transfer,
    "growing-eps": growing_eps,
    "unbounded": unbounded,
    "planted": planted,
}
"""All checks by name."""
