"""Faults of what all attacks share: the contract, units, norms, losses, and what a model is left like."""

from __future__ import annotations

from faults.fault import Fault

CONTRACT = "tests/attacks/test_contract.py::"
OPTIMAL = "tests/attacks/wasserstein/test_optimal.py::"
TRAINING = "tests/attacks/gradient/test_training_attacks.py::"
GRAPHS = "tests/modules/test_graphs.py::"
NASTY = (
    f"{CONTRACT}test_leaves_a_nasty_module_as_it_was[linf-pgd]",
    f"{CONTRACT}test_leaves_a_failing_module_as_it_was",
)

FAULTS = [
    # ------------------------------------------------------------------------------------- the contract
    Fault(
        "results are not clamped to the bounds",
        "attacks/problem.py",
        "self.threat.to_model(self.box.clamp(data)).to(self.dtype)",
        "self.threat.to_model(data).to(self.dtype)",
        (f"{CONTRACT}test_never_leaves_bounds_or_ball[none-(0.0, 1.0)-linf-n-fgsm]",),
    ),
    Fault(
        "an explicit step size does not follow the radius",
        "attacks/base.py",
        'changes["step_size"] = step_size * self.threat.ratio_to(eps)',
        'changes["step_size"] = step_size',
        (f"{OPTIMAL}test_a_step_size_keeps_its_ratio_to_the_radius",),
    ),
    Fault(
        "the model is shown data units",
        "attacks/problem.py",
        "inputs = self.threat.to_model(data)",
        "inputs = data",
        (f"{CONTRACT}test_normalisation_changes_nothing[linf-pgd]",),
    ),
    Fault(
        "the seed is ignored",
        "attacks/problem.py",
        ".manual_seed(attack.seed)",
        ".manual_seed(0)",
        (f"{CONTRACT}test_deterministic[linf-pgd]",),
    ),
    Fault(
        "float16 gradients are not scaled up",
        "attacks/problem.py",
        "return (4096, 64, 1) if half else (1,)",
        "return (1,)",
        (f"{CONTRACT}test_float16_gradients_do_not_underflow[model-fgsm]",),
    ),
    Fault(
        "the scale of float16 gradients is not taken out again",
        "attacks/problem.py",
        "gradient if scale == 1 else gradient / scale",
        "gradient",
        (f"{TRAINING}test_lagrangian_in_float16",),
    ),
    Fault(
        "structured labels do not follow their samples",
        "attacks/problem.py",
        "lambda label: label[index]",
        "lambda label: label",
        (f"{CONTRACT}test_structured_labels_follow_their_samples",),
    ),
    Fault(
        "modes are restored as the module's own",
        "modules/state/isolation.py",
        "            submodule.training = training",
        "            submodule.training = module.training",
        NASTY,
    ),
    Fault("written buffers are not restored", "modules/state/snapshot.py", "tensor.copy_(self.value)", "pass", NASTY),
    Fault(
        "NumPy's random state is not restored",
        "modules/state/isolation.py",
        "np.random.set_state(numpy)",
        "pass",
        NASTY,
    ),
    Fault(
        "the penultimate layer is the first linear one",
        "modules/recording.py",
        "for module in reversed(ran):",
        "for module in ran:",
        ("tests/callbacks/test_defense.py::TestLoss::test_features_of_any_layer",),
    ),
    # ------------------------------------------------------------------------------ threat, norms, losses
    Fault(
        "the bounds are not widened for strays",
        "attacks/threat.py",
        "Box(data.clamp(max=low), data.clamp(min=high))",
        "Box(torch.full_like(data, low), torch.full_like(data, high))",
        ("tests/attacks/test_threat.py::test_a_few_strays_widen_the_box_for_themselves_alone",),
    ),
    Fault(
        "the mean is subtracted on the way to data units",
        "attacks/threat.py",
        "return data if mean is None else data + mean",
        "return data if mean is None else data - mean",
        ("tests/attacks/test_threat.py::test_units_round_trip",),
    ),
    Fault(
        "the L2 projection also lengthens",
        "attacks/norms.py",
        "(eps / length).clamp(max=1.0)",
        "(eps / length)",
        (f"{OPTIMAL}test_a_step_follows_autograd_in_data_units",),
    ),
    Fault(
        "starts crowd at the centre of the L2 ball",
        "attacks/norms.py",
        " ** (1 / math.prod(like.shape[1:]))",
        "",
        (f"{OPTIMAL}test_starts_are_uniform_in_the_ball",),
    ),
    Fault(
        "the divergence of TRADES has its sides exchanged",
        "attacks/losses.py",
        "F.kl_div(adversarial, clean,",
        "F.kl_div(clean, adversarial,",
        (f"{OPTIMAL}test_losses_have_the_gradients_of_their_formulas",),
    ),
    Fault(
        "the margin has the wrong sign",
        "attacks/losses.py",
        "others - logits.gather(1, right).squeeze(1)",
        "logits.gather(1, right).squeeze(1) - others",
        (f"{OPTIMAL}test_losses_have_the_gradients_of_their_formulas",),
    ),
    Fault(
        "a single logit stands for class 0",
        "modules/outputs.py",
        "[torch.zeros_like(outputs), outputs]",
        "[outputs, torch.zeros_like(outputs)]",
        ("tests/modules/test_outputs.py::test_one_logit_is_two",),
    ),
    # ------------------------------------------------------------------------------------- graphs
    Fault(
        "a graph is taken of a module that has changed",
        "modules/graphs.py",
        "key = what, self._state",
        "key = what, ()",
        (f"{GRAPHS}test_a_module_that_has_changed_is_recorded_anew",),
    ),
    Fault(
        "a graph goes on with the labels that it was recorded with",
        "modules/graphs.py",
        "zip(self._own, tensors, strict=True)",
        "zip(self._own[:1], tensors[:1], strict=True)",
        (
            f"{GRAPHS}test_the_second_attack_is_recorded_and_all_are_the_same",
            f"{GRAPHS}test_labels_that_change_within_an_attack",
        ),
    ),
    Fault(
        "a graph gives away the memory that it writes to",
        "modules/graphs.py",
        "return self._result.clone()",
        "return self._result",
        (f"{GRAPHS}test_the_second_attack_is_recorded_and_all_are_the_same",),
    ),
    Fault(
        "a graph reads what autocast has cast before",
        "modules/graphs.py",
        "cache_enabled=False",
        "cache_enabled=True",
        (f"{GRAPHS}test_casts_of_autocast_are_made_inside",),
    ),
    Fault(
        "graphs are recorded at first sight",
        "modules/graphs.py",
        "if recorded is None and key in kept.recent:",
        "if recorded is None:",
        (f"{GRAPHS}test_odd_last_batches_are_not_recorded",),
    ),
    Fault(
        "all losses share a graph",
        "attacks/problem.py",
        "name = loss, self.dtype",
        "name = self.dtype",
        (f"{GRAPHS}test_what_differs_has_a_graph_of_its_own",),
    ),
    Fault(
        "parts of a batch are replayed",
        "attacks/problem.py",
        "            replays=None,\n",
        "            replays=self.replays,\n",
        (f"{GRAPHS}test_restarts_are_replayed_on_the_whole_batch_alone", f"{GRAPHS}test_what_runs_without"),
    ),
]
