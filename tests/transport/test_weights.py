"""A weight counts copies of a point, and a point of weight zero is none: whatever it holds, and for all that depends on the cloud."""

import pytest
import torch

from lightning_wdefense.transport import (
    SinkhornDivergence,
    SlicedWasserstein,
    sinkhorn,
    sinkhorn_divergence,
    sliced_wasserstein,
)

PADDING = [0.0, -999.0, 1e9, 3e38, float("inf"), float("-inf"), float("nan")]
HERE_X, HERE_Y = [1, 2, 4, 5, 6, 8, 9, 10, 12, 14, 15, 17], [0, 1, 3, 6, 7, 8, 11, 12, 15]


def clouds(dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 3, generator=rng), 0.7 * torch.randn(9, 3, generator=rng) + 0.5
    a, b = torch.rand(12, generator=rng) + 0.1, torch.rand(9, generator=rng) + 0.1
    return [each.to(dtype) for each in (x, y, a / a.sum(), b / b.sum())]


def padded(cloud, weights, here, padding, length):
    """The cloud at some places of a longer one, whose other points have no weight and values of ``padding`` by turns."""
    values = torch.tensor((padding * length)[:length], dtype=torch.float64).to(cloud.dtype)
    points = values[:, None].repeat(1, cloud.shape[1])
    points[here] = cloud
    filled = weights.new_zeros(length)
    filled[here] = weights
    return points, filled


def own_cost(x, y):
    """Not defined at zero, where clouds are padded most often."""
    return 1 - (x @ y.mT) / (x.norm(dim=-1)[..., :, None] * y.norm(dim=-1)[..., None, :])


def value_of_sinkhorn(*arguments, **options):
    return sinkhorn(*arguments, **options).value


LABELS = {"label_cost": 0.7}
CASES = {
    "sinkhorn": (value_of_sinkhorn, {}),
    "sinkhorn, p=1 and reach": (value_of_sinkhorn, {"p": 1, "reach": 0.8}),
    "sinkhorn, own cost": (value_of_sinkhorn, {"cost": own_cost}),
    "sinkhorn, geomloss": (value_of_sinkhorn, {"solver": "geomloss"}),
    "divergence": (sinkhorn_divergence, {}),
    "p=1": (sinkhorn_divergence, {"p": 1}),
    "small blur": (sinkhorn_divergence, {"relative_blur": 0.05}),
    "blur": (sinkhorn_divergence, {"blur": 0.1}),
    "reach": (sinkhorn_divergence, {"reach": 0.5}),
    "reach, small blur": (sinkhorn_divergence, {"reach": 0.3, "blur": 0.05}),
    "p=1, reach": (sinkhorn_divergence, {"p": 1, "reach": 0.5}),
    "labels": (sinkhorn_divergence, LABELS),
    "soft labels": (sinkhorn_divergence, LABELS),
    "labels, reach": (sinkhorn_divergence, {"reach": 0.8, **LABELS}),
    "cosine": (sinkhorn_divergence, {"cost": "cosine"}),
    "own cost": (sinkhorn_divergence, {"cost": own_cost}),
    "own cost, reach and labels": (sinkhorn_divergence, {"cost": own_cost, "reach": 1.0, **LABELS}),
    "geomloss": (sinkhorn_divergence, {"solver": "geomloss"}),
    "geomloss, p=1 and reach": (sinkhorn_divergence, {"solver": "geomloss", "p": 1, "reach": 0.8}),
    "module": (lambda *arguments, **options: SinkhornDivergence(p=1)(*arguments, **options), {}),
    "orthogonal": (sliced_wasserstein, {}),
    "random": (sliced_wasserstein, {"directions": "random", "p": 1}),
    "max": (sliced_wasserstein, {"directions": "max"}),
    "given": (sliced_wasserstein, {"directions": torch.eye(3).double(), "p": 3}),
    "sliced module": (lambda *arguments: SlicedWasserstein(p=1.5)(*arguments), {}),
}


def labels_for(case, here, length):
    if "soft" not in case:
        labels = torch.full((length,), -100)
        labels[here] = torch.arange(len(here)) % 3
        return labels, labels[here]
    labels = torch.tensor([0.0, float("nan"), 7.0]).repeat(length, 1)
    labels[::2] = 0
    labels[here] = torch.rand(len(here), 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    return labels, labels[here]


def evaluate(function, inputs, **options):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*inputs, **options)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_padding_of_any_value_changes_nothing(case, dtype):
    function, options = CASES[case]
    x, y, a, b = clouds(dtype)
    far_x, far_a = padded(x, a, HERE_X, PADDING, 19)
    far_y, far_b = padded(y, b, HERE_Y, PADDING[::-1], 16)
    few, many = {}, {}
    if "labels" in case:
        many["x_labels"], few["x_labels"] = labels_for(case, HERE_X, 19)
        many["y_labels"], few["y_labels"] = labels_for(case, HERE_Y, 16)
    expected, expected_gradients = evaluate(function, (x, y, a, b), **options, **few)
    value, gradients = evaluate(function, (far_x, far_y, far_a, far_b), **options, **many)
    rounding = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value, expected, rtol=0.1 * rounding, atol=0)
    for gradient, wanted, here in zip(gradients, expected_gradients, (HERE_X, HERE_Y) * 2, strict=True):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[here], wanted, rtol=0, atol=rounding * float(wanted.abs().max()))
    for gradient, here in zip(gradients, (HERE_X, HERE_Y), strict=False):
        elsewhere = torch.ones(len(gradient), dtype=torch.bool)
        elsewhere[here] = False
        assert (gradient[elsewhere] == 0).all()
