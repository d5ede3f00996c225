"""Sensitivity: the first order of the worst expected loss, against closed forms and a solver of the inner problem."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from lightning_wdefense.metrics import Sensitivity, sensitivity

GRADIENTS = torch.tensor([[3.0, -4.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
DUAL = {"l1": [4.0, 1.0, 0.0], "l2": [5.0, 1.0, 0.0], "linf": [7.0, 1.0, 0.0]}


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
def test_is_the_norm_of_the_dual_norms(norm, p):
    expected = np.array(DUAL[norm])
    q = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
    expected = expected.max() if p == 1 else np.mean(expected**q) ** (1 / q)
    assert sensitivity(GRADIENTS, p, norm).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
def test_is_exact_for_a_linear_loss(norm, p):
    """For losses ``<g_i, x>`` the worst case within the budget is that of a convex problem in the lengths of the moves."""
    dual, radius = torch.tensor(DUAL[norm], dtype=torch.float64), 0.3
    if math.isinf(p):
        worst = radius * dual.mean().item()
    elif p == 1:
        worst = radius * dual.max().item()  # all of the budget for the steepest sample
    else:
        # Lagrangian dual: min over l of l radius^p + mean max_t (g t - l t^p), whose inner maximum has a closed form.
        def value(log: float) -> float:
            level = math.exp(log)
            t = (dual / (level * p)) ** (1 / (p - 1))
            return level * radius**p + (dual * t - level * t**p).mean().item()

        worst = minimize_scalar(value, bounds=(-15, 15), method="bounded", options={"xatol": 1e-10}).fun
    assert radius * sensitivity(GRADIENTS, p, norm).item() == pytest.approx(worst, rel=1e-6)


def test_predicts_the_loss_of_the_best_small_moves():
    """Each input moves along the optimal direction of the first-order problem; the mean loss grows as predicted."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    inputs, labels = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), torch.arange(20) % 3

    def losses(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x), labels, reduction="none")

    (gradients,) = torch.autograd.grad(losses(inputs).sum(), inputs)
    radius = 1e-5
    moves = radius * gradients / gradients.norm(dim=1).square().mean().sqrt()  # W_2 cost: radius
    with torch.no_grad():
        growth = (losses(inputs + moves) - losses(inputs)).mean().item() / radius
    assert sensitivity(gradients, p=2).item() == pytest.approx(growth, rel=1e-4)


@pytest.mark.parametrize("p", [1.0001, 1.01])
@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_powers_neither_overflow_nor_vanish(p, unit):
    found = sensitivity(GRADIENTS * unit, p).item()
    assert found == pytest.approx(5 * unit, rel=0.02)
    metric = Sensitivity(p)
    metric.update(GRADIENTS * unit)
    assert metric.compute().item() == pytest.approx(found, rel=1e-6)


def test_shapes_and_zeros():
    images = GRADIENTS.view(3, 1, 2, 1)
    assert sensitivity(images) == sensitivity(GRADIENTS)
    assert sensitivity(torch.tensor([1.0, -3.0]), p=1) == 3  # one value per sample
    assert sensitivity(torch.zeros(4, 2)) == 0
    assert sensitivity(torch.empty(0, 2)).isnan()
