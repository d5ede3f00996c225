"""Faults of transport: debiasing, prices, precision, scales, safeguards of the iterations, and what keeps a critic Lipschitz."""

from __future__ import annotations

from faults.fault import Fault

VALUES = "tests/transport/test_values.py::"
GRADIENTS = "tests/transport/test_gradients.py::"
STATE = "tests/transport/test_state.py::"
CONVERGENCE = "tests/transport/test_convergence.py::"
SOLVERS = "tests/transport/test_solvers.py::"
SLICED = "tests/transport/test_sliced.py::"
CRITIC = "tests/transport/test_critic.py::"
SMALL = "tests/transport/test_small.py::"

FAULTS = [
    # ------------------------------------------------------------------------------------------ Sinkhorn
    Fault(
        "the divergence keeps half of one bias",
        "transport/second_order.py",
        '{"xy": 1.0, "xx": -0.5, "yy": -0.5}',
        '{"xy": 1.0, "xx": -0.5, "yy": 0.0}',
        (f"{VALUES}test_zero_between_equal_clouds",),
    ),
    Fault(
        "the label cost is dropped",
        "transport/costs.py",
        "label_disagreement(some, y_labels, block.dtype), alpha=price, out=out)",
        "label_disagreement(some, y_labels, block.dtype), alpha=0 * price, out=out)",
        (f"{VALUES}test_labels_in_the_cost",),
    ),
    Fault(
        "soft labels disagree twice as much",
        "transport/costs.py",
        "return 0.5 * torch.cdist(x, y, p=1)",
        "return torch.cdist(x, y, p=1)",
        (f"{VALUES}test_soft_labels_cost_their_total_variation",),
    ),
    Fault(
        "squared distances never fall back to float64",
        "transport/costs.py",
        "if torch.finfo(dtype).eps * max(float(squares.max()) for squares in weighty) > ROUNDING * eps:",
        "if False:",
        ("tests/transport/test_gradients.py",),
    ),
    Fault(
        "the divergence of unequal masses has no excess",
        "transport/divergence.py",
        " + 0.5 * evaluation.blur**p * excess.square()",
        "",
        (f"{VALUES}test_unbalanced_divergence_is_that_of_its_definition",),
    ),
    Fault(
        "the reach is not raised to the order",
        "transport/options.py",
        "float(self.reach) ** self.p",
        "float(self.reach)",
        (f"{VALUES}test_unbalanced_value_is_that_of_pot",),
    ),
    Fault(
        "the blur is relative to a squared distance",
        "transport/problem.py",
        "options.relative_blur * mean ** (1 / options.p)",
        "options.relative_blur * mean",
        (f"{VALUES}test_blur_is_relative_to_the_typical_distance",),
    ),
    Fault(
        "gradients of points are those without debiasing",
        "transport/evaluation.py",
        "one if one is None or other is None else one.sub_(other)",
        "one",
        (f"{GRADIENTS}test_gradients_of_points_and_weights",),
    ),
    Fault(
        "gradients of weights forget the others' mass",
        "transport/optimum.py",
        "(density(potential, rho) - others.sum(-1, keepdim=True))",
        "density(potential, rho)",
        (f"{GRADIENTS}test_gradients_of_points_and_weights",),
    ),
    Fault(
        "second derivatives forget the reach",
        "transport/second_order.py",
        "torch.ones_like(eps) if ctx.rho is None else 1 + eps / ctx.rho",
        "torch.ones_like(eps)",
        (f"{GRADIENTS}test_second_derivatives",),
    ),
    Fault(
        "points without weight have no potential",
        "transport/solver.py",
        "g = torch.where(b > 0, g, kernel.column_potential(f))",
        "pass",
        (f"{VALUES}test_points_of_no_weight_know_their_potential",),
    ),
    Fault(
        "converged is what is not",
        "transport/entropic.py",
        "solution.n_iter, error, error <= tol,",
        "solution.n_iter, error, error > tol,",
        (f"{SOLVERS}test_result",),
    ),
    Fault(
        "the Anderson steps have no safeguard",
        "transport/iteration.py",
        "                if not _all(kept):",
        "                if False:",
        ("tests/transport/test_convergence.py",),
    ),
    Fault(
        "the kernel is never made anew",
        "transport/iteration.py",
        "if not length <= ABSORBED:",
        "if False:",
        (f"{CONVERGENCE}test_hard_problems_converge", f"{CONVERGENCE}test_float32_is_right_to_one_percent"),
    ),
    Fault(
        "Sinkhorn begins at the final temperature",
        "transport/annealing.py",
        "return math.floor(math.log(max(1.0, WARMEST * mean / eps)) / math.log(COOLING))",
        "return 0",
        (f"{CONVERGENCE}test_annealing_saves_iterations",),
    ),
    Fault(
        "a potential of another shape is recalled",
        "transport/warm_start.py",
        "self.potential.shape != like.shape or ",
        "",
        (f"{CONVERGENCE}test_warm_start", f"{CONVERGENCE}test_a_useless_start_does_no_harm"),
    ),
    Fault(
        "Newton's steps down are not taken back",
        "transport/newton.py",
        "kernel.absorb(best, kernel.eps)",
        "pass",
        (f"{SMALL}test_steps_that_lead_down_are_taken_back",),
    ),
    Fault(
        "Newton's method goes on for ever",
        "transport/newton.py",
        "n_iter >= max_iter or steps >= STEPS or falls >= FALLS",
        "n_iter >= 10 * max_iter",
        (f"{SMALL}test_iterations_are_limited", f"{SMALL}test_what_newton_cannot_finish_ends_as_without_it"),
    ),
    Fault(
        "the curvature forgets the reach",
        "transport/dense.py",
        "dsyrk(-self.share, root.T",
        "dsyrk(-1.0, root.T",
        (f"{SMALL}test_few_steps_are_enough",),
    ),
    Fault(
        "the kernel of a small problem is never made anew",
        "transport/newton.py",
        "if abs(look.w).max() > ABSORBED:",
        "if False:",
        ("tests/transport/test_small.py", "tests/transport/test_convergence.py"),
    ),
    Fault(
        "small points without weight have no potential",
        "transport/small.py",
        "g[kept], plan[:, kept] = found.g, found.plan",
        "g[:], plan[:, kept] = 0, found.plan\n    g[kept] = found.g",
        (f"{SMALL}test_is_what_the_iteration_finds", f"{VALUES}test_points_of_no_weight_know_their_potential"),
    ),
    Fault(
        "gradients of small problems forget the distance",
        "transport/small.py",
        "numpy.where(distances > 0, plan / distances, 0)",
        "plan",
        (f"{SMALL}test_is_what_the_iteration_finds",),
    ),
    Fault(
        "half precision stays half",
        "transport/measures.py",
        "torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)",
        "torch.promote_types(x.dtype, y.dtype)",
        (f"{STATE}test_computes_in_float32_or_better",),
    ),
    Fault(
        "autocast reaches Sinkhorn",
        "transport/divergence.py",
        'if isinstance(x, Tensor) else "cpu", enabled=False)',
        'if isinstance(x, Tensor) else "cpu", enabled=torch.is_autocast_enabled("cpu"))',
        (f"{STATE}test_autocast_changes_nothing",),
    ),
    Fault(
        "the precision of matrix products is not restored",
        "transport/precision.py",
        "            if _users == 0:\n                _allow(_allowed)",
        "            pass",
        ("tests/transport/test_state.py",),
    ),
    Fault(
        "geomloss anneals by half",
        "transport/second_opinion.py",
        "SCALING = 0.99",
        "SCALING = 0.5",
        (f"{SOLVERS}test_geomloss_agrees",),
    ),
    # -------------------------------------------------------------------------------------------- sliced
    Fault(
        "sliced distances are not scaled back",
        "transport/sliced.py",
        ".pow(1 / options.p) * scale",
        ".pow(1 / options.p)",
        (f"{SLICED}test_is_that_of_pot",),
    ),
    Fault(
        "levels of weights are not rescaled",
        "transport/one_dimensional.py",
        "    levels_y = levels_y * (levels_x[..., -1:] / levels_y[..., -1:])\n",
        "",
        ("tests/transport/test_sliced.py",),
    ),
    Fault(
        "levels of weights are summed in float32",
        "transport/one_dimensional.py",
        'torch.float32 if a.device.type == "mps" else torch.float64',
        "torch.float32",
        (f"{SLICED}test_levels_are_not_rounded",),
    ),
    Fault(
        "orthogonal directions keep the signs of QR",
        "transport/directions.py",
        "(basis * signs.unsqueeze(-2)).mT",
        "basis.mT",
        (f"{SLICED}test_directions_are_uniform",),
    ),
    Fault(
        "the ascent leaves the tangent space",
        "transport/max_direction.py",
        "gradient - (gradient * at).sum(-1, keepdim=True) * at",
        "gradient",
        ("tests/transport/test_sliced.py",),
    ),
    Fault(
        "directions ignore the seed",
        "transport/sliced.py",
        "torch.Generator().manual_seed(options.seed)",
        "torch.Generator().manual_seed(0)",
        (f"{SLICED}test_seed_and_generator",),
    ),
    # -------------------------------------------------------------------------------------------- critics
    Fault(
        "the gap has the wrong sign",
        "transport/critic.py",
        "scores[: len(x)].mean() - scores[len(x) :].mean()",
        "scores[len(x) :].mean() - scores[: len(x)].mean()",
        (f"{CRITIC}test_scores_fall_towards_the_other_cloud",),
    ),
    Fault(
        "the penalty pulls gradients to zero",
        "transport/critic.py",
        "excess = norm - 1",
        "excess = norm",
        (f"{CRITIC}test_gradient_norm_is_measured_between_the_clouds",),
    ),
    Fault(
        "the one-sided penalty has two",
        "transport/critic.py",
        "excess = excess.clamp_min(0)",
        "pass",
        (f"{CRITIC}test_gradient_norm_is_measured_between_the_clouds",),
    ),
    Fault(
        "a critic's scores are in units of its scale",
        "transport/critic.py",
        "return scores.reshape(len(points)) * self.scale",
        "return scores.reshape(len(points))",
        (f"{CRITIC}test_units_do_not_matter",),
    ),
    Fault(
        "a weak critic is believed as much as a strong one",
        "transport/critic.py",
        ".mean().clamp_min(1) if self.penalised",
        ".mean() if self.penalised",
        (f"{CRITIC}test_bounded_gap_is_the_gap_where_there_is_no_overshoot",),
    ),
    Fault(
        "ranks scale their points each by its own",
        "transport/critic.py",
        "size = average((points - mean).square().mean()).sqrt()",
        "size = (points - mean).square().mean().sqrt()",
        (f"{CRITIC}test_two_ranks_are_one",),
    ),
    Fault(
        "the agreement of batches is not loaded",
        "transport/critic_training.py",
        'self.agreement = state["agreement"]',
        "pass",
        (f"{CRITIC}test_stopped_and_resumed_it_continues_exactly",),
    ),
    Fault(
        "the critic takes a step too many",
        "transport/critic_training.py",
        "for _ in range(steps - 1):",
        "for _ in range(steps):",
        (f"{CRITIC}test_more_steps_are_taken_on_the_same_batch", f"{CRITIC}test_steps_follow_the_need"),
    ),
    Fault(
        "convolutions that overlap are not divided by it",
        "transport/lipschitz.py",
        "_SpectralNorm(overlap**0.5)",
        "_SpectralNorm(1.0)",
        (f"{CRITIC}test_convolutions_that_overlap",),
    ),
    Fault(
        "steps leave the orthonormal matrices",
        "transport/layerwise.py",
        "as_matrix(weight).copy_(retract(as_matrix(weight), lr))",
        "pass",
        (f"{CRITIC}test_no_layer_exceeds_one",),
    ),
]
