"""Faults of the training objective: signs, weights, units, what is learned and kept, and the bounds of a certificate."""

from __future__ import annotations

from faults.fault import Fault

DEFENSE = "tests/callbacks/test_defense.py::"
DISCREPANCIES = "tests/defenses/test_discrepancies.py::"
REWEIGHTING = "tests/defenses/losses/test_reweighting.py::"
JACOBIAN = "tests/defenses/losses/test_jacobian.py::"
BIND = "tests/defenses/test_bind.py::"
RANKS = "tests/ranks/"
DDP = "tests/callbacks/test_ddp.py::"
PURIFIER = "tests/defenses/purifier/test_purifier.py::"
SMOOTHING = "tests/defenses/smoothing/test_smoothing.py::"


def formula(recipe: str) -> tuple[str, ...]:
    """Training with a recipe against the same by hand."""
    return (f"{DEFENSE}TestLoss::test_equals_the_formula[{recipe}]",)


FAULTS = [
    # ------------------------------------------------------------------------------- recipes and their sum
    Fault(
        "TRADES weighs its divergence 1",
        "defenses/recipe.py",
        '_training_attack(threat, "kl"), "clean", "kl", 6.0',
        '_training_attack(threat, "kl"), "clean", "kl", 1.0',
        formula("trades"),
    ),
    Fault(
        "MART has no margin term",
        "defenses/recipe.py",
        "weight=5.0, margin_weight=1.0",
        "weight=5.0",
        formula("mart"),
    ),
    Fault(
        "the radius of the warm-up reaches no attack",
        "defenses/terms.py",
        "attack.with_eps(attack.threat.eps * radius)",
        "attack",
        (f"{DEFENSE}TestLoss::test_eps_grows_over_the_warmup",),
    ),
    Fault(
        "steps of the warm-up are rounded down",
        "defenses/terms.py",
        "math.ceil(radius * attack.steps)",
        "int(radius * attack.steps)",
        (f"{DEFENSE}TestLoss::test_steps_grow_with_the_radius",),
    ),
    Fault(
        "the other branch's loss has no weight",
        "defenses/objective.py",
        'recipe.other_weight * parts["other_loss"]',
        'parts["other_loss"]',
        (f"{DEFENSE}TestLoss::test_the_other_branch_and_the_margin_have_weights",),
    ),
    Fault(
        "the margin term has no weight",
        "defenses/objective.py",
        'recipe.margin_weight * parts["margin_loss"]',
        'parts["margin_loss"]',
        (f"{DEFENSE}TestLoss::test_the_other_branch_and_the_margin_have_weights",),
    ),
    Fault(
        "the runner-up may be the right class",
        "defenses/objective.py",
        "F.log_softmax(logits, 1).scatter(1, classes.clamp_min(0).unsqueeze(1), -torch.inf).amax(1)",
        "F.log_softmax(logits, 1).amax(1)",
        formula("mart"),
    ),
    # -------------------------------------------------------------------------------------- discrepancies
    Fault(
        "the divergence has its sides exchanged",
        "defenses/discrepancies.py",
        "return kl_divergence(adversarial, clean).mean()",
        "return kl_divergence(clean, adversarial).mean()",
        formula("trades"),
    ),
    Fault(
        "MART weighs what is sure the most",
        "defenses/discrepancies.py",
        "* (1 - right)",
        "* right",
        formula("mart"),
    ),
    Fault(
        "MMD counts the mixed pairs once",
        "transport/kernels/gaussian.py",
        "- 2 * kernel[:n, n:].mean()",
        "- kernel[:n, n:].mean()",
        formula("mmd"),
    ),
    Fault(
        "CORAL is not scaled by the square of the dimension",
        "defenses/discrepancies.py",
        "(4 * one.shape[1] ** 2)",
        "(4 * one.shape[1])",
        formula("coral"),
    ),
    Fault(
        "class transport drops the label cost",
        "defenses/discrepancies.py",
        "label_cost=self.relative_label_cost,",
        "label_cost=0.0,",
        (f"{DISCREPANCIES}TestClassTransport",),
    ),
    Fault(
        "class transport is scaled back by the root",
        "defenses/discrepancies.py",
        "return cost * scale.square()",
        "return cost * scale",
        (f"{DISCREPANCIES}TestClassTransport",),
    ),
    Fault(
        "the scale of class transport is not a constant for the gradient",
        "defenses/discrepancies.py",
        "(x.detach() - y.detach().mean(0))",
        "(x - y.mean(0))",
        (f"{DISCREPANCIES}TestClassTransport", *formula("class-transport")),
    ),
    # --------------------------------------------------------------------------- what is learned and moved
    Fault(
        "the multiplier is not averaged over ranks",
        "defenses/defense.py",
        "settings.ranks.mean_of_samples(displacement, len(adversarial))",
        "displacement",
        (f"{DDP}test_two_processes",),
    ),
    Fault(
        "a loop's noise is the same in every step",
        "defenses/defense.py",
        "seeded_generator(inputs.device, self.seed, number, ranks.rank)",
        "seeded_generator(inputs.device, self.seed, ranks.rank)",
        (f"{BIND}TestCall::test_the_noise_is_that_of_the_seed_and_the_step",),
    ),
    Fault(
        "a loop has no warm-up",
        "defenses/defense.py",
        "if self.recipe.active and self.warmup_steps else 1.0",
        "if False else 1.0",
        (f"{BIND}test_callback_mixin_and_own_loop_train_the_same_model[pgd-at]",),
    ),
    Fault(
        "the step is run twice",
        "defenses/defense.py",
        "            task, seen = result\n",
        "            task, seen = step(passes.values if sees_clean else adversarial)\n",
        (f"{DEFENSE}TestLeavesAlone::test_batchnorm_sees_the_branches_and_not_the_attack",),
    ),
    Fault(
        "the hooks stay after a detach",
        "defenses/defense.py",
        "        self.recorder.detach()\n        self.restore_weights()\n",
        "        self.restore_weights()\n",
        (f"{BIND}TestCall::test_after_detach_the_model_is_as_before",),
    ),
    Fault(
        "the gradient of gathered samples is divided by the number of ranks",
        "defenses/defense.py",
        "return value + (ranks.size - 1) * (value - value.detach())",
        "return value",
        (f"{RANKS}test_ranks.py::test_ranks_train_as_one",),
    ),
    Fault(
        "gathered labels are those of this rank",
        "defenses/branch.py",
        "return self.ranks.gather(labels, self.sizes)",
        "return labels.repeat(self.ranks.size)[: sum(self.sizes)]",
        (f"{RANKS}test_ranks.py::test_ranks_train_as_one",),
    ),
    Fault(
        "weights are perturbed along each rank's own gradient",
        "defenses/weight_perturbation.py",
        "if ranks.size == 1 or not weights:",
        "if True:",
        (f"{RANKS}test_ranks.py::test_ranks_train_as_one",),
    ),
    Fault(
        "the attack uses each rank's own running statistics",
        "defenses/defense.py",
        "        synchronise_buffers(self.model)\n",
        "",
        (f"{RANKS}test_wrappers.py::test_wrapped_models",),
    ),
    Fault(
        "no pass goes through the wrapper",
        "defenses/forward_passes.py",
        "contextlib.nullcontext() if synchronised else bypassed(self._wrapper)",
        "bypassed(self._wrapper)",
        (f"{RANKS}test_wrappers.py::test_wrapped_models",),
    ),
    Fault(
        "a rank stops its restarts alone",
        "attacks/gradient/pgd.py",
        "if not problem.anywhere(len(open_) > 0):",
        "if len(open_) == 0:",
        (f"{RANKS}test_fsdp.py::test_as_ddp[quick]",),
    ),
    Fault(
        "a sharded model runs parts of batches",
        "attacks/problem.py",
        "whole = execution.whole or ranks.size > 1 or not",
        "whole = execution.whole or not",
        (f"{RANKS}test_fsdp.py::test_as_ddp[quick]",),
        survives="FSDP2 accepts any batch size; whole batches only keep an empty part from failing in the user's model.",
    ),
    Fault(
        "the critic is not saved",
        "defenses/defense.py",
        "critic = None if self.critic is None else self.critic.state_dict()",
        "critic = None",
        (f"{DEFENSE}TestResuming::test_a_resumed_run_ends_with_the_same_weights[critic]",),
    ),
    Fault(
        "success counts what was wrong before",
        "defenses/defense.py",
        "(right & ~still).sum()",
        "(~still).sum()",
        (f"{DEFENSE}TestLogging::test_measurements_are_those_of_the_batch_that_is_logged",),
    ),
    Fault(
        "transport cost is between a batch and itself",
        "defenses/defense.py",
        "Transport()(clean.features.detach(), attacked.features.detach())",
        "Transport()(clean.features.detach(), clean.features.detach())",
        (f"{DEFENSE}TestLogging::test_measurements_are_those_of_the_batch_that_is_logged",),
    ),
    Fault(
        "weights stay perturbed after an exception in the step",
        "defenses/defense.py",
        "            waiting = False\n            raise",
        "            raise",
        ("tests/test_mixin.py::test_perturbed_weights_come_back_after_an_error",),
    ),
    Fault(
        "weights are perturbed by a length of the step's own",
        "defenses/weight_perturbation.py",
        "self.size * weight.norm() / length",
        "self.size / length",
        (f"{DEFENSE}TestLoss::test_weight_perturbation_equals_the_formula[pgd-at]",),
    ),
    Fault(
        "weights come back before the backward pass",
        "defenses/defense.py",
        "perturbation.undo_after(loss)",
        "perturbation.undo()",
        (f"{DEFENSE}TestLoss::test_weight_perturbation_equals_the_formula[pgd-at]",),
    ),
    Fault(
        "the critic gathers gradients of the model's loss",
        "defenses/critic.py",
        "with training.critic.frozen(), eager():",
        "with eager():",
        (f"{DISCREPANCIES}test_the_critic_learns_nothing_from_the_models_loss",),
    ),
    Fault(
        "the critic of a batch that failed is kept",
        "defenses/critic.py",
        "self._training, self._loaded = before ",
        "pass ",
        (f"{DEFENSE}test_a_critic_made_for_a_batch_that_fails_is_not_kept",),
    ),
    Fault(
        "what was frozen is thawed",
        "_frozen.py",
        "parameter.requires_grad_(flag)",
        "parameter.requires_grad_(True)",
        (f"{PURIFIER}test_the_classifier_and_the_random_state_stay_as_they_were",),
    ),
    # ------------------------------------------------------------------------------------------ purifiers
    Fault(
        "the purifier's noise does not know the batch",
        "defenses/purifier/purifier.py",
        "self.current_epoch, batch_idx, self.global_rank",
        "self.current_epoch, 0, self.global_rank",
        (f"{PURIFIER}test_noise_differs_by_seed_epoch_batch_and_rank",),
    ),
    Fault(
        "the purifier's noise does not know the epoch",
        "defenses/purifier/purifier.py",
        "self.current_epoch, batch_idx, self.global_rank",
        "0, batch_idx, self.global_rank",
        (f"{PURIFIER}test_noise_differs_by_seed_epoch_batch_and_rank",),
    ),
    Fault(
        "reconstruction is measured in model units",
        "defenses/purifier/purifier.py",
        "(self.threat.to_data(float32_or_better(each)) for each in (inputs, purified))",
        "(float32_or_better(each) for each in (inputs, purified))",
        (f"{PURIFIER}test_normalised_inputs_make_no_difference",),
    ),
    Fault(
        "reconstruction has no weight",
        "defenses/purifier/purifier.py",
        'self.weights["reconstruction"] * parts["reconstruction"]',
        'parts["reconstruction"]',
        (f"{PURIFIER}test_a_weight_of_zero_drops_the_term",),
    ),
    Fault(
        "the purifier's critic is not averaged over ranks",
        "defenses/purifier/purifier.py",
        "generator=noise, average=average, measure=True",
        "generator=noise, measure=True",
        (f"{DDP}test_two_processes",),
    ),
    Fault(
        "BPDA passes no gradient on",
        "defenses/purifier/classifier.py",
        "return gradient, None",
        "return torch.zeros_like(gradient), None",
        (f"{PURIFIER}test_bpda_differentiates_the_classifier_at_the_purified_point",),
    ),
    Fault(
        "purified inputs may leave the bounds",
        "defenses/purifier/generators.py",
        "return torch.clamp(purified, low, high)",
        "return purified",
        (f"{PURIFIER}test_normalised_inputs_make_no_difference",),
    ),
    # ------------------------------------------------------------------------------------------ smoothing
    Fault(
        "the Euclidean radius is that of the Manhattan distance",
        "defenses/smoothing/wasserstein.py",
        '(math.sqrt(2) if self.ground == "euclidean" else 1.0)',
        "1.0",
        (f"{SMOOTHING}test_radius_beside_the_papers",),
    ),
    Fault(
        "the radius counts half the share of noisy images",
        "defenses/smoothing/wasserstein.py",
        "(2 * (1 - probability))",
        "(1 - probability)",
        (f"{SMOOTHING}test_the_radius_is_exact_for_a_linear_model",),
    ),
    Fault(
        "sigma is taken for the Laplace scale",
        "defenses/smoothing/wasserstein.py",
        "scale = self.sigma / math.sqrt(2) * data.sum(",
        "scale = self.sigma * data.sum(",
        (f"{SMOOTHING}test_sigma_is_the_standard_deviation_of_a_share_of_the_mass",),
    ),
    Fault(
        "the Gaussian radius is that of a one-sided Laplace variable",
        "defenses/smoothing/gaussian.py",
        "torch.special.ndtri(probability)",
        "-(2 * (1 - probability)).log()",
        (f"{SMOOTHING}test_the_radius_is_exact_for_a_linear_model",),
    ),
    Fault(
        "the certificate draws the same noise whatever the generator",
        "defenses/smoothing/base.py",
        "counts = run(model, data, inputs.dtype, self.samples, generator)",
        "counts = run(model, data, inputs.dtype, self.samples, self._generator(data, None))",
        (f"{SMOOTHING}test_certificates_are_wrong_no_more_often_than_alpha",),
    ),
    Fault(
        "the certificate takes the estimate for its lower bound",
        "defenses/smoothing/base.py",
        "self.radius(lower_bound(counts, self.samples, self.alpha)).float()",
        "self.radius(counts / self.samples).float()",
        (f"{SMOOTHING}test_certificates_are_wrong_no_more_often_than_alpha",),
    ),
    Fault(
        "the confidence is that of a two-sided bound",
        "defenses/smoothing/binomial.py",
        "< math.log(alpha)",
        "< math.log(alpha / 2)",
        (f"{SMOOTHING}test_lower_bound",),
    ),
    Fault(
        "the p-value is one-sided",
        "defenses/smoothing/binomial.py",
        "(2 * torch.tensor(tails, dtype=torch.float64).exp())",
        "torch.tensor(tails, dtype=torch.float64).exp()",
        (f"{SMOOTHING}test_p_value",),
    ),
    Fault(
        "a certified answer need not be right",
        "defenses/smoothing/certificate.py",
        "(right & (certificate.radii > eps))",
        "(certificate.radii > eps)",
        (f"{SMOOTHING}test_certified_accuracy",),
    ),
    Fault(
        "a radius includes its end",
        "defenses/smoothing/certificate.py",
        "certificate.radii > eps)",
        "certificate.radii >= eps)",
        (f"{SMOOTHING}test_certified_accuracy",),
    ),
    # ------------------------------------------------------------------------------- reweighting and the Jacobian
    Fault(
        "the mean is counted twice",
        "defenses/losses/reweighting.py",
        "weights - 1 / len(weights)",
        "weights",
        (f"{REWEIGHTING}test_the_step_minimises_the_reweighted_cross_entropy",),
    ),
    Fault(
        "the bisection begins above the temperature",
        "defenses/losses/reweighting.py",
        "math.sqrt(8 * radius)",
        "math.sqrt(80 * radius)",
        (f"{REWEIGHTING}test_the_radius_is_spent_and_units_do_not_matter",),
    ),
    Fault(
        "the weighted loss is averaged over ranks",
        "defenses/losses/reweighting.py",
        "added = ranks.size * ",
        "added = 1.0 * ",
        (f"{REWEIGHTING}test_all_ranks_share",),
    ),
    Fault(
        "the Jacobian is a constant",
        "defenses/losses/jacobian.py",
        "create_graph=True",
        "retain_graph=True",
        (f"{JACOBIAN}test_the_gradient_in_the_weights_is_that_of_the_whole_jacobian",),
    ),
    Fault(
        "the slope is not that of all directions",
        "defenses/losses/jacobian.py",
        "features[0].numel() / len(features)",
        "1 / len(features)",
        (f"{JACOBIAN}test_random_directions_estimate_the_frobenius_norm",),
    ),
    Fault(
        "the slope is in the pipeline's units",
        "defenses/defense.py",
        "replace(threat, mean=None).to_model(slopes)",
        "slopes",
        (f"{JACOBIAN}test_it_is_in_data_units",),
    ),
]
