"""Every error names the argument, what it was and what to do."""

import pytest
import torch

from lightning_wdefense.transport import SinkhornDivergence, sinkhorn, sinkhorn_divergence

X, Y = torch.zeros(4, 3), torch.ones(5, 3)
BATCH_X, BATCH_Y = torch.zeros(2, 4, 3), torch.ones(2, 5, 3)
NAN = torch.full((4, 3), float("nan"))
HARD_X, HARD_Y = torch.zeros(4, dtype=torch.long), torch.zeros(5, dtype=torch.long)
SOFT_X, SOFT_Y = torch.full((4, 2), 0.5), torch.full((5, 2), 0.5)

BAD_INPUTS = {
    "not a tensor": (([[0.0]], Y), {}, TypeError, r"x must be a torch.Tensor, got list"),
    "integers": ((X, Y.long()), {}, TypeError, r"y must have a floating dtype, got torch.int64: pass y.float\(\)"),
    "one dimension": ((X[0], Y), {}, ValueError, r"x must have shape \(N, D\) or \(B, N, D\), got \(3,\)"),
    "images": ((X, torch.zeros(5, 3, 8, 8)), {}, ValueError, r"y must have .* got \(5, 3, 8, 8\). .*y.flatten\(1\)"),
    "empty": ((X[:0], Y), {}, ValueError, r"x is empty: its shape is \(0, 3\)"),
    "no batch": ((BATCH_X[:0], BATCH_Y[:0]), {}, ValueError, r"x is empty"),
    "NaN": ((NAN, Y), {}, ValueError, r"x \(4, 3\) holds NaN or infinite"),
    "infinite": ((X, Y / 0), {}, ValueError, r"y \(5, 3\) holds NaN or infinite"),
    "other D": ((X, Y[:, :2]), {}, ValueError, r"x and y must agree .* x \(4, 3\) and y \(5, 2\)"),
    "other batch": ((BATCH_X, BATCH_Y[:1]), {}, ValueError, r"x and y must agree .* x \(2, 4, 3\) and y \(1, 5, 3\)"),
    "one batched": ((BATCH_X, Y), {}, ValueError, r"x and y must agree"),
    "other device": ((X, Y.to("meta")), {}, ValueError, r"y is on meta, x is on cpu: move them to one device"),
    "weights' shape": (
        (X, Y, torch.ones(5)),
        {},
        ValueError,
        r"a must hold one weight for each point of x, shape \(4,\)",
    ),
    "weights' type": ((X, Y, [0.25] * 4), {}, TypeError, r"a must be a torch.Tensor"),
    "integer weights": ((X, Y, HARD_X), {}, TypeError, r"a must have a floating dtype"),
    "negative weights": (
        (X, Y, None, Y[:, 0] - 2),
        {},
        ValueError,
        r"b must not be negative, its smallest value is -1",
    ),
    "NaN weights": ((X, Y, NAN[:, 0]), {}, ValueError, r"a \(4,\) holds NaN"),
    "no mass": ((X, Y, X[:, 0]), {}, ValueError, r"a sums to zero"),
    "no mass, unbalanced": ((X, Y, X[:, 0]), {"reach": 1.0}, ValueError, r"a sums to zero"),
    "unequal sums": (
        (X, Y, None, Y[:, 0]),
        {},
        ValueError,
        r"a and b must have equal sums, got 1 and 5 .*normalise.*reach=",
    ),
    "no labels": ((X, Y), {"label_cost": 1.0}, ValueError, r"label_cost=1.0 needs labels: pass x_labels and y_labels"),
    "one label": ((X, Y), {"label_cost": 1.0, "x_labels": HARD_X}, ValueError, r"pass y_labels, or label_cost=None"),
    "labels' length": ((X, Y), {"x_labels": HARD_Y}, ValueError, r"x_labels must hold one label for each point of x"),
    "labels' type": ((X, Y), {"x_labels": [0, 1, 2, 3]}, TypeError, r"x_labels must be a torch.Tensor, got list"),
    "soft labels' length": ((X, Y), {"y_labels": SOFT_X}, ValueError, r"y_labels .* shape \(5, K\) .* got \(4, 2\)"),
    "logits": ((X, Y), {"y_labels": 3 * SOFT_Y}, ValueError, r"y_labels .* must be probabilities"),
    "mixed labels": ((X, Y), {"x_labels": HARD_X, "y_labels": SOFT_Y}, ValueError, r"must both be integer"),
    "other classes": ((X, Y), {"x_labels": SOFT_X, "y_labels": torch.ones(5, 1)}, ValueError, r"over the same classes"),
    "cost's shape": (
        (X, Y),
        {"cost": lambda x, y: y @ x.T},
        ValueError,
        r"cost\(x, y\) must return .* \(4, 5\); got \(5, 4\)",
    ),
    "cost's type": (
        (X, Y),
        {"cost": lambda x, y: None},
        TypeError,
        r"cost\(x, y\) must return a torch.Tensor, got NoneType",
    ),
    "cost's values": ((X, Y), {"cost": lambda x, y: x @ y.T / 0}, ValueError, r"cost\(x, y\) returned NaN or infinite"),
    "negative cost": ((X, Y), {"cost": lambda x, y: x @ y.T - 1}, ValueError, r"cost is -1 on average.*pass blur="),
}

BAD_SETTINGS = {
    "p": ({"p": 3}, ValueError, r"p must be 1 .* or 2 .* got 3"),
    "blur": ({"blur": 0.0}, ValueError, r"blur must be positive and finite .*got 0.0"),
    "blur's type": ({"blur": "0.1"}, TypeError, r"blur must be a number .* got str"),
    "relative_blur": ({"relative_blur": -0.2}, ValueError, r"relative_blur must be positive"),
    "relative_blur's type": ({"relative_blur": None}, TypeError, r"relative_blur must be a number"),
    "reach": ({"reach": 0}, ValueError, r"reach must be positive .*None for balanced"),
    "infinite reach": ({"reach": float("inf")}, ValueError, r"reach must be positive and finite"),
    "label_cost": ({"label_cost": -1.0}, ValueError, r"label_cost must be at least 0"),
    "cost": ({"cost": "cosin"}, ValueError, r"no cost 'cosin'. Did you mean 'cosine'"),
    "cost's type": ({"cost": 2}, TypeError, r"cost must be a callable .* got int"),
    "cosine's p": ({"cost": "cosine", "p": 1}, ValueError, r"p must be 2, got 1"),
    "tol": ({"tol": 0}, ValueError, r"tol must be positive"),
    "max_iter": ({"max_iter": 0}, ValueError, r"max_iter must be a positive integer, got 0"),
    "solver": ({"solver": "geomlos"}, ValueError, r"no solver 'geomlos'. Did you mean 'geomloss'\?"),
}


@pytest.mark.parametrize("function", [sinkhorn, sinkhorn_divergence])
@pytest.mark.parametrize(("args", "options", "error", "match"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(function, args, options, error, match):
    with pytest.raises(error, match=match):
        function(*args, **options)


@pytest.mark.parametrize("function", [lambda **bad: sinkhorn(X, Y, **bad), SinkhornDivergence])
@pytest.mark.parametrize(("options", "error", "match"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(function, options, error, match):
    with pytest.raises(error, match=match):
        function(**options)
