"""Faults of the audit: its checks, its views of a model, and what it counts."""

from __future__ import annotations

from faults.fault import Fault

AUDIT = "tests/audit/test_audit.py::"
VIEWS = "tests/audit/test_views.py::"
ZOO = "tests/audit/test_zoo.py::test_the_audit_tells_it_apart"
CALLBACK = "tests/callbacks/test_audit.py::"

FAULTS = [
    Fault(
        "probabilities pass as logits",
        "audit/audit.py",
        "activation = activation_of(found)",
        "activation = None",
        (f"{ZOO}[probabilities]",),
    ),
    Fault(
        "a random model is taken for a fixed one",
        "audit/audit.py",
        "random = bool(once.isfinite().all()) and",
        "random = False and",
        (f"{AUDIT}test_everything_is_left_as_it_was[None]",),
    ),
    Fault(
        "the modes that the model was given in are not looked at",
        "audit/checks/outputs.py",
        "with isolated(case.module, device, evaluation=evaluation), torch.no_grad():",
        "with isolated(case.module, device), torch.no_grad():",
        (f"{ZOO}[left in training mode]",),
    ),
    Fault(
        "saturated logits are not counted",
        "audit/checks/outputs.py",
        "-math.log(torch.finfo(torch.float32).tiny)",
        "torch.inf",
        (f"{ZOO}[temperature]",),
    ),
    Fault(
        "logits are not rescaled",
        "audit/views/noise.py",
        "return logits / spread.clamp_min(torch.finfo(logits.dtype).tiny) * math.log(1e4)",
        "return logits",
        (f"{VIEWS}test_rescaled_logits_have_gradients",),
    ),
    Fault(
        "gradients of zero are not seen",
        "audit/checks/gradients.py",
        "zero = lengths <= 1e-6 * lengths.median()",
        "zero = lengths < 1e-6 * lengths.median()",
        (f"{ZOO}[quantised inputs]",),
    ),
    Fault(
        "the slope is compared with itself",
        "audit/checks/gradients.py",
        "ratio = (actual / predicted)[known]",
        "ratio = (predicted / predicted)[known]",
        (f"{ZOO}[a backward of its own]",),
    ),
    Fault(
        "rounding has no gradient straight through",
        "audit/views/straight_through.py",
        '            if name.rstrip("_") in STEPS:',
        "            if name in ():",
        (f"{VIEWS}test_straight_through[round]",),
    ),
    Fault(
        "no_grad in forward is obeyed",
        "audit/views/straight_through.py",
        "if args and args[0] is False:",
        "if False:",
        (f"{VIEWS}test_straight_through[no_grad]",),
    ),
    Fault(
        "a comparison below has the slope of one above",
        "audit/views/straight_through.py",
        '"lt": -1',
        '"lt": 1',
        (f"{VIEWS}test_straight_through[less]",),
    ),
    Fault(
        "what a check breaks does not count in the audited accuracy",
        "audit/case.py",
        "self.lost = self.lost | wrong",
        "self.lost = self.lost | (wrong & False)",
        (f"{ZOO}[quantised inputs]",),
    ),
    Fault(
        "the claim counts only its first attack",
        "audit/audit.py",
        "left = left & (case.classes(moved, case.base) == case.labels)",
        "left = case.right & (case.classes(moved, case.base) == case.labels)",
        (f"{AUDIT}test_the_claim_is_the_worst_case_of_its_attacks",),
    ),
    Fault(
        "values at a bound have no gradient",
        "audit/views/straight_through.py",
        "(values >= low) & (values <= high)",
        "(values > low) & (values < high)",
        ("tests/audit/test_views.py::test_values_at_a_bound_have_a_gradient",),
    ),
    Fault(
        "features of other layers are taken for the same ones",
        "audit/checks/planted.py",
        "            raise NoFeaturesError\n        found",
        "            return self._view(inputs).float()\n        found",
        (f"{AUDIT}test_a_model_that_runs_other_layers_at_each_call",),
    ),
    Fault(
        "the hooks of the planted features stay",
        "audit/checks/planted.py",
        "        features.close()",
        "        pass",
        (f"{AUDIT}test_everything_is_left_as_it_was[None]",),
    ),
    Fault(
        "attacks run on data units",
        "audit/checks/gradients.py",
        "loss = margin(view(case.threat.to_model(point)), labels).sum()",
        "loss = margin(view(point), labels).sum()",
        (f"{AUDIT}test_units_make_no_difference",),
    ),
    Fault(
        "the callback audits a step that does more than forward",
        "callbacks/audit.py",
        "if isinstance(found, StepBatch):",
        "if False:",
        (f"{CALLBACK}test_a_step_that_does_more_is_refused",),
    ),
]
