"""Faults of the module's own step as a function, and of the ways through it."""

from __future__ import annotations

from faults.fault import Fault

INVISIBLE = "tests/pipelines/test_invisible.py::test_standard_recipe_and_monitor_leave_no_trace"
GAIN = "tests/pipelines/test_defended.py::test_gain"
MONITORED = "tests/pipelines/test_monitored.py::test_own_metric_under_attack"
STEPS, SHADOW, THROUGH = (
    "tests/modules/test_steps.py",
    "tests/callbacks/evaluation/test_user_metrics.py",
    "tests/callbacks/test_through.py",
)

FAULTS = [
    # -------------------------------------------------------------------------------- the step as a function
    Fault(
        "containers are not put back",
        "modules/state/step_state.py",
        "if not _same(container, content):",
        "if False:",
        (STEPS, f"{INVISIBLE}[appends_outputs]"),
    ),
    Fault(
        "values of metrics and parameters are not put back",
        "modules/state/snapshot.py",
        "written = [each for each in kept if each.written]",
        "written: list[TensorSnapshot] = []",
        (STEPS, f"{INVISIBLE}[byol]"),
    ),
    Fault(
        "parameters that the step moves stay moved",
        "modules/state/step_state.py",
        "self._keep_parameters(list(module.parameters()))",
        "pass",
        (STEPS, f"{INVISIBLE}[byol]"),
    ),
    Fault(
        "each call of the step draws other numbers",
        "modules/steps.py",
        "        self._random.restore()\n",
        "",
        (STEPS,),
    ),
    Fault(
        "the other branch draws other noise than the user's own call",
        "modules/steps.py",
        "            random.restore()\n",
        "",
        (THROUGH,),
    ),
    Fault(
        "loggers take what the attack logs",
        "modules/state/muted_logging.py",
        "[MutedLogger(each) for each in loggers]",
        "loggers",
        (STEPS,),
    ),
    Fault(
        "schedulers are stepped by the attack",
        "modules/state/muted_logging.py",
        "            return _do_nothing\n",
        "            return getattr(self._wrapped, name)\n",
        (STEPS,),
    ),
    # -------------------------------------------------------------------------------------------- first look
    Fault(
        "values that the step changes first go unseen",
        "attacks/steps/inspection.py",
        "if not torch.equal(received, values.detach().to(received.dtype)):",
        "if False:",
        (THROUGH, f"{GAIN}[normalised_in_step]"),
    ),
    Fault(
        "embeddings are taken for logits",
        "attacks/steps/classification.py",
        "return float(falls.float().mean()) >= MIN_SHARE and (invariant or against_the_rest)",
        "return True",
        (THROUGH, f"{MONITORED}[hard_triplets]", f"{MONITORED}[autoencoder]"),
    ),
    Fault(
        "a consumed iterator goes unseen",
        "attacks/steps/inspection.py",
        "if moved and iterators_of(step.module):",
        "if False:",
        ("tests/pipelines/test_refused.py::test_refused[consumed_iterator]",),
    ),
    Fault(
        "a loss that does not depend on the inputs goes unseen",
        "callbacks/route.py",
        "if not self.plain and not inspection.differentiable:",
        "if False:",
        ("tests/pipelines/test_refused.py::test_refused[detached_inputs]", THROUGH),
    ),
    # ------------------------------------------------------------------------------------------- the shadow
    Fault(
        "the shadow counts on in the user's metrics",
        "callbacks/evaluation/user_metrics.py",
        "                theirs.restore()\n",
        "                pass\n",
        (SHADOW, f"{INVISIBLE}[metric_compute]"),
    ),
    Fault(
        "the shadow forgets between batches",
        "callbacks/evaluation/user_metrics.py",
        "                self._state = StepState(module)\n",
        "                pass\n",
        (SHADOW, f"{MONITORED}[metric_compute]"),
    ),
    Fault(
        "the end of the epoch is not the user's own",
        "callbacks/evaluation/user_metrics.py",
        'self._hook(f"on_{self._stage}_epoch_end")',
        "pass",
        (SHADOW, f"{MONITORED}[metric_compute]"),
    ),
    Fault(
        "samples that were wrong before are not attacked",
        "evaluation/protocol.py",
        "everyone=by_gradient",
        "everyone=False",
        (f"{MONITORED}[arcface]", "tests/callbacks/test_monitor.py::test_only_what_is_left_is_attacked"),
    ),
    # ----------------------------------------------------------------------------------- where it acts
    Fault(
        "padding is moved",
        "attacks/steps/sites.py",
        "            delta = delta * self._free.to(delta.dtype)",
        "            pass",
        ("tests/attacks/steps/test_sites.py", "tests/callbacks/test_perturb.py"),
    ),
]
