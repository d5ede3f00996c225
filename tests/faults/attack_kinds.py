"""Faults of the attacks, each by itself, and of several together: steps, projections, signs, and which result is kept."""

from __future__ import annotations

from faults.fault import Fault

OPTIMAL = "tests/attacks/wasserstein/test_optimal.py::"
TRAINING = "tests/attacks/gradient/test_training_attacks.py::"
SHARED = "tests/attacks/gradient/test_shared_budget.py::"
WORST_CASE = ("tests/attacks/test_worst_case.py",)
LOCAL = "tests/attacks/wasserstein/test_local_transport.py::"
PARTS = "tests/attacks/standard/test_parts.py::"

DISTANCES = "tests/attacks/minimal/test_distances.py::"

FAULTS = [
    # ------------------------------------------------------------------------------------- minimum-norm attacks and L1
    Fault(
        "the L1 projection forgets the box",
        "attacks/norms.py",
        "room = torch.where(delta > 0, high, -low).reshape(size.shape).clamp_min(0).to(size.dtype)",
        "room = torch.full_like(size, torch.inf)",
        (f"{DISTANCES}test_projection_onto_the_l1_ball_and_the_box",),
    ),
    Fault(
        "the rows of no samples have no shape",
        "attacks/norms.py",
        "values.reshape(len(values), math.prod(values.shape[1:]))",
        "values.reshape(len(values), -1)",
        ("tests/attacks/test_threat.py::test_balls_of_no_samples",),
    ),
    Fault(
        "steps in L1 do not see the box",
        "attacks/problem.py",
        "return l1_step(gradient, length, self.box.low - data, self.box.high - data)",
        "return l1_step(gradient, length)",
        (f"{DISTANCES}test_pgd_in_l1_reaches_the_optimum_of_a_linear_model",),
    ),
    Fault(
        "the last adversarial input is kept, not the closest",
        "attacks/minimal/base.py",
        "closer = fooled & (lengths < self.distances[chosen])",
        "closer = fooled",
        (f"{DISTANCES}test_the_closest_of_all_steps_is_kept",),
    ),
    Fault(
        "a misclassified sample is searched for",
        "attacks/minimal/base.py",
        "right = (~problem.fooled(outputs)).nonzero().squeeze(1)",
        "right = torch.arange(len(inputs))",
        (f"{DISTANCES}test_linear_model",),
    ),
    Fault(
        "the closest input is not tightened",
        "attacks/minimal/base.py",
        "low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)",
        "low, high = low, high",
        (f"{DISTANCES}test_linear_model",),
    ),
    Fault(
        "the radius of a boundary that was not found does not grow",
        "attacks/minimal/fmn.py",
        "torch.maximum(linear, radius)) * (1 + share)",
        "linear)",
        (f"{DISTANCES}test_linear_model", f"{DISTANCES}test_linear_model_in_a_box", f"{DISTANCES}test_network"),
    ),
    Fault(
        "bisection ends early",
        "attacks/minimal/minimal_eps.py",
        "(fails - enough > 1)",
        "(fails - enough > 40)",
        (f"{DISTANCES}test_no_sample_is_asked_more_than_bisection_needs", f"{DISTANCES}test_the_wasserstein_norm"),
    ),
    Fault(
        "every sample is asked at every eps",
        "attacks/minimal/minimal_eps.py",
        "chosen = (open_ & (trial == index)).nonzero().squeeze(1)",
        "chosen = torch.arange(len(trial))",
        (f"{DISTANCES}test_no_sample_is_asked_more_than_bisection_needs",),
    ),
    # ------------------------------------------------------------------------------------- PGD and FGSM
    Fault(
        "PGD does not project into the ball",
        "attacks/gradient/pgd.py",
        "problem.project_(problem.step(gradient, data, self._step).add_(data))",
        "problem.box.clamp_(problem.step(gradient, data, self._step).add_(data))",
        (f"{OPTIMAL}test_reaches_the_optimum_of_a_linear_model",),
    ),
    Fault(
        "PGD's default step is that of FGSM",
        "attacks/gradient/pgd.py",
        "2.5 * self.threat.eps / self.steps",
        "self.threat.eps",
        (f"{OPTIMAL}test_default_step_is_two_and_a_half_radii_over_the_steps",),
    ),
    Fault(
        "PGD takes a step too few",
        "attacks/gradient/pgd.py",
        "for index in range(self.steps):\n            data = self._move",
        "for index in range(self.steps - 1):\n            data = self._move",
        ("tests/attacks/test_peers.py::test_pgd_from_the_clean_inputs_is_torchattacks_pgd",),
    ),
    Fault(
        "the Gaussian start does not know the data's range",
        "attacks/gradient/start.py",
        "GAUSSIAN_START * spread *",
        "GAUSSIAN_START *",
        (f"{OPTIMAL}test_gaussian_start_has_the_deviation_of_trades",),
    ),
    Fault(
        "a restart must fool and raise the loss",
        "attacks/gradient/pgd.py",
        "better = newly | (loss > worst[open_])",
        "better = newly & (loss > worst[open_])",
        (f"{OPTIMAL}test_each_restart_only_makes_it_worse",),
    ),
    Fault(
        "early exit forgets those that never fell",
        "attacks/gradient/pgd.py",
        "        found[left] = data\n        return found",
        "        return found",
        ("tests/modules/test_execution.py::test_early_exit_leaves_each_sample_where_it_is_first_wrong",),
    ),
    Fault(
        "N-FGSM's noise is not in units of eps",
        "attacks/gradient/fgsm.py",
        "problem.random_point(self.noise * eps)",
        "problem.random_point(self.noise)",
        (f"{OPTIMAL}test_n_fgsm_is_its_formula",),
    ),
    # -------------------------------------------------------------------------------- attacks for training
    Fault(
        "the multiplier descends",
        "attacks/gradient/soft_ball.py",
        "(self.threat.eps - float(displacement))",
        "(float(displacement) - self.threat.eps)",
        (f"{TRAINING}test_the_multiplier_ascends_and_stays_above_zero",),
    ),
    Fault(
        "displacement is measured in model units",
        "attacks/gradient/soft_ball.py",
        "to_data = self.threat.to_data",
        "to_data = lambda inputs: inputs",
        (f"{TRAINING}test_displacement_is_measured_in_data_units",),
    ),
    Fault(
        "the Lagrangian rewards distance",
        "attacks/gradient/lagrangian.py",
        "- 2 * gamma * (data - clean)",
        "+ 2 * gamma * (data - clean)",
        (f"{TRAINING}test_lagrangian_solves_a_linear_loss",),
    ),
    Fault(
        "the default gamma forgets the root of the dimension",
        "attacks/gradient/lagrangian.py",
        "self.threat.eps * math.sqrt(elements)",
        "self.threat.eps * elements",
        (f"{TRAINING}test_lagrangian_default_moves_a_unit_gradient_to_the_edge",),
    ),
    Fault(
        "the temperature multiplies",
        "attacks/gradient/gibbs_noise.py",
        "loss / self.temperature + gumbel",
        "loss * self.temperature + gumbel",
        (f"{TRAINING}test_gibbs_noise_picks_with_the_weights_of_the_softmax",),
    ),
    Fault(
        "scattering's gradient shrinks with the batch",
        "attacks/gradient/feature_scattering.py",
        "value.new_tensor(float(len(data)))",
        "value.new_ones(())",
        (f"{TRAINING}test_scattering_in_float16_whatever_the_batch",),
    ),
    Fault(
        "the Sinkhorn attack shows itself",
        "attacks/gradient/sinkhorn.py",
        "weights[-1] = -self.weight * len(data)",
        "weights[-1] = self.weight * len(data)",
        ("tests/attacks/gradient/test_sinkhorn.py::test_takes_its_step_along_the_gradient",),
    ),
    # ------------------------------------------------------------------------------------ a budget that samples share
    Fault(
        "lengths grow with the power of the gain, not of the slope",
        "attacks/gradient/allocation.py",
        "relative.pow(q - 1)",
        "relative.pow(q)",
        (f"{SHARED}test_shares_maximise_a_linear_loss",),
    ),
    Fault(
        "the threshold is that of all samples, the short ones too",
        "attacks/gradient/allocation.py",
        "(excess / counts).amax()",
        "(excess / counts)[-1]",
        (f"{SHARED}test_lengths_go_to_the_nearest_in_the_budget[1]",),
    ),
    Fault(
        "what is lost already goes on being moved",
        "attacks/gradient/shared_budget.py",
        ".clamp_max(self.clip)",
        "",
        (f"{SHARED}test_what_counts_no_more_is_left_to_the_others",),
    ),
    Fault(
        "each rank has the whole budget",
        "attacks/gradient/shared_budget.py",
        "_Samples(problem.ranks if self.all_ranks else ALONE, clean)",
        "_Samples(ALONE, clean)",
        (f"{SHARED}test_all_ranks_share",),
    ),
    # ------------------------------------------------------------------------------------ several attacks
    Fault(
        "robust against one attack is robust",
        "attacks/worst_case.py",
        "left = left & (predicted == self.labels)",
        "left = left | (predicted == self.labels)",
        WORST_CASE,
    ),
    Fault(
        "a later attack overwrites the input that broke a sample",
        "attacks/worst_case.py",
        "fresh = ~broken[chosen]",
        "fresh = torch.ones_like(broken[chosen])",
        WORST_CASE,
    ),
    Fault(
        "attacks in order attack what has fallen",
        "attacks/worst_case.py",
        "else open_ & ~broken)",
        "else open_)",
        WORST_CASE,
    ),
    Fault(
        "APGD-T aims at a class too few",
        "attacks/labels.py",
        "min(count, logits.shape[1] - 1)",
        "min(count, logits.shape[1] - 2)",
        (f"{PARTS}test_fab_finds_the_closest_point_of_a_linear_model",),
    ),
    Fault(
        "the targeted ratio divides by the distance to the third logit",
        "attacks/standard/dlr.py",
        "top[:, 2:].mean(1)",
        "top[:, 2]",
        (f"{PARTS}test_dlr_does_not_heed_shift_and_scale",),
    ),
    Fault(
        "APGD's momentum points backwards",
        "attacks/standard/apgd.py",
        ".sub_(run.previous, alpha=momentum)",
        ".add_(run.previous, alpha=momentum)",
        (f"{PARTS}test_apgd_solves_a_linear_model", f"{PARTS}test_apgd_leaves_what_torchattacks_leaves"),
    ),
    Fault(
        "APGD's checkpoints do not come closer",
        "attacks/standard/apgd.py",
        "period = max(period - shorter, least)",
        "period = max(period, least)",
        (f"{PARTS}test_the_checkpoints_are_the_published_ones",),
    ),
    Fault(
        "lost samples stay in APGD's passes",
        "attacks/standard/apgd.py",
        "stay = (wrong < run.elements).nonzero().squeeze(1)",
        "stay = (wrong <= run.elements).nonzero().squeeze(1)",
        (f"{PARTS}test_a_lost_sample_leaves_and_the_rest_go_on",),
    ),
    Fault(
        "FAB keeps the farthest input",
        "attacks/standard/fab.py",
        "fooled & (distance < self.distance)",
        "fooled & ((distance > self.distance) | self.distance.isinf())",
        (f"{PARTS}test_fab_finds_the_closest_point_of_a_linear_model",),
    ),
    Fault(
        "FAB's moves leave the box",
        "attacks/standard/hyperplane.py",
        "return sign * torch.minimum(rate * per_sample(time, rate), room)",
        "return sign * rate * per_sample(time, rate)",
        (f"{PARTS}test_the_shortest_move_is_the_shortest",),
    ),
    Fault(
        "Square's windows do not shrink",
        "attacks/standard/square.py",
        "self.p_init / 2 ** sum(",
        "self.p_init / 1 ** sum(",
        (f"{PARTS}test_squares_windows_shrink_by_the_schedule",),
    ),
    Fault(
        "what AutoAttack's parts find is lost",
        "attacks/standard/autoattack.py",
        "part.run(problem, found)",
        "part.run(problem, Found(problem))",
        ("tests/attacks/standard/test_autoattack.py::test_leaves_no_more_than_any_of_its_parts",),
    ),
    Fault(
        "torchattacks' radius is not rescaled with the bounds",
        "attacks/standard/torchattack.py",
        "self.threat.eps / (high - low)",
        "self.threat.eps",
        ("tests/attacks/standard/test_torchattack.py::test_a_radius_is_rescaled_with_the_bounds",),
    ),
    # ----------------------------------------------------------------------------------- transport of images
    Fault(
        "costs of moves heed no order",
        "attacks/wasserstein/local_transport.py",
        "math.sqrt(square) ** p for",
        "math.sqrt(square) for",
        (f"{LOCAL}test_a_square",),
    ),
    Fault(
        "plans are stretched to the budget",
        "attacks/wasserstein/projection.py",
        "clamp_min(torch.finfo(cost.dtype).tiny)).clamp(max=1)",
        "clamp_min(torch.finfo(cost.dtype).tiny))",
        (f"{LOCAL}test_what_is_legal_stays_as_it_is",),
    ),
    Fault(
        "the budget goes to the worst moves first",
        "attacks/wasserstein/linear_oracle.py",
        "descending=True",
        "descending=False",
        (f"{LOCAL}test_the_best_plan_is_the_linear_programs",),
    ),
    Fault(
        "feasibility forgives a change of mass",
        "attacks/wasserstein/feasibility.py",
        " & (self.mass <= tol)",
        "",
        ("tests/attacks/wasserstein/test_feasibility.py::test_feasible_is_each_of_the_three",),
    ),
    Fault(
        "the distance is not the root of its cost",
        "attacks/wasserstein/feasibility.py",
        "/ float(clean.sum())) ** (1 / p)",
        "/ float(clean.sum()))",
        ("tests/attacks/wasserstein/test_feasibility.py::test_it_is_the_distance_of_optimal_transport",),
    ),
    Fault(
        "a sample that fell gets up in the next round",
        "attacks/wasserstein/attack.py",
        "self.fooled[index] |= fooled",
        "self.fooled[index] = fooled",
        ("tests/attacks/wasserstein/test_wasserstein.py::test_a_sample_that_fell_stays_fallen",),
    ),
]
