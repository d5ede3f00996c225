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

pytestmark = pytest.mark.usefixtures("either_way")

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
    "sinkhorn, geomloss": (value_of_sinkhorn, {"solver": "geomloss", "p": 1, "reach": 0.8}),
    "divergence": (sinkhorn_divergence, {}),
    "p=1": (sinkhorn_divergence, {"p": 1}),
    # At small blurs the order of the points alone moves the gradient in float32 by as much as the tolerance lets it.
    "small blur": (sinkhorn_divergence, {"relative_blur": 0.05, "tol": 1e-5}),
    "blur": (sinkhorn_divergence, {"blur": 0.1, "tol": 1e-5}),
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


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("function", [sinkhorn_divergence, sliced_wasserstein])
def test_padding_of_one_value_that_comes_first(function, padding):
    x, y, _, _ = clouds(torch.float32)
    points, weights = padded(y, torch.full((9,), 1 / 9), list(range(6, 15)), [padding], 15)
    torch.testing.assert_close(function(x, points, b=weights), function(x, y), rtol=1e-5, atol=0)


def test_what_is_reported_is_that_of_the_cloud():
    x, y, a, b = clouds()
    far_x, far_a = padded(x, a, HERE_X, PADDING, 19)
    far_y, far_b = padded(y, b, HERE_Y, PADDING[::-1], 16)
    for options in (
        {},
        {"p": 1},
        {"reach": 0.8},
        {"reach": 0.3, "blur": 0.05},
        {"cost": own_cost},
        {"solver": "geomloss"},
    ):
        few, many = sinkhorn(x, y, a, b, **options), sinkhorn(far_x, far_y, far_a, far_b, **options)
        assert many.n_iter == few.n_iter
        for one, other in zip((few.blur, few.marginal_error), (many.blur, many.marginal_error), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(many.f[HERE_X], few.f, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(many.g[HERE_Y], few.g, rtol=1e-9, atol=1e-9)
        assert many.f.isfinite().all()
        assert many.g.isfinite().all()


def test_padding_does_not_shorten_the_steps_of_others():
    x, y, a, b = clouds(seed=7)
    far_x, far_a = padded(x, a, HERE_X, PADDING, 19)
    far_y, far_b = padded(3 * y, b, HERE_Y, PADDING, 16)
    few, many = (sinkhorn(*each, reach=0.5, blur=0.1) for each in ((x, 3 * y, a, b), (far_x, far_y, far_a, far_b)))
    assert many.n_iter == few.n_iter
    torch.testing.assert_close(many.value, few.value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "case",
    ["divergence", "p=1", "reach", "labels", "cosine", "own cost", "orthogonal", "max"],
)
def test_each_problem_of_a_batch_has_padding_of_its_own(case):
    """Here, none at all, another number of points, and in another place."""
    function, options = CASES[case]
    lengths = [(12, 9), (5, 9), (12, 2), (7, 4)]
    singles = [[each[:n] for each, n in zip(clouds(seed=i), 2 * size, strict=True)] for i, size in enumerate(lengths)]
    singles = [[x * 10**i, y * 10**i, a / a.sum(), b / b.sum()] for i, (x, y, a, b) in enumerate(singles)]
    here = [
        [
            sorted(torch.randperm(n, generator=torch.Generator().manual_seed(i))[: len(points)].tolist())
            for n, points in ((12, x), (9, y))
        ]
        for i, (x, y, _, _) in enumerate(singles)
    ]
    pairs = [
        (padded(x, a, at_x, PADDING, 12), padded(y, b, at_y, PADDING, 9))
        for (x, y, a, b), (at_x, at_y) in zip(singles, here, strict=True)
    ]
    batch = [torch.stack([pair[side][part] for pair in pairs]) for part in (0, 1) for side in (0, 1)]
    many, few = {}, [{}] * 4
    if case == "labels":
        many = {"x_labels": torch.arange(48).view(4, 12) % 3, "y_labels": torch.arange(36).view(4, 9) % 3}
        few = [{key: labels[i][at] for (key, labels), at in zip(many.items(), here[i], strict=True)} for i in range(4)]
    value, gradients = evaluate(function, batch, **options, **many)
    for i, single in enumerate(singles):
        expected, expected_gradients = evaluate(function, single, **options, **few[i])
        torch.testing.assert_close(value[i], expected, rtol=1e-8, atol=0)
        for gradient, wanted, at in zip(gradients, expected_gradients, here[i] * 2, strict=True):
            assert gradient.isfinite().all()
            torch.testing.assert_close(gradient[i][at], wanted, rtol=0, atol=1e-8 * float(wanted.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_weights_count_copies(case):
    """Whatever is taken from the data, such as the blur, comes out the same, to rounding."""
    function, options = CASES[case]
    if (
        "small blur" in case
    ):  # Where kernel entries underflow each point has its own floor, and the path depends on them.
        options = {**options, "tol": 1e-7}
    x, y, _, _ = clouds()
    copies_x, copies_y = torch.arange(12) % 3 + 1, torch.arange(9) % 2 + 1
    few, many = {}, {}
    if "labels" in case:
        few["x_labels"], few["y_labels"] = labels_for(case, HERE_X, 19)[1], labels_for(case, HERE_Y, 16)[1]
        many = {
            key: labels.repeat_interleave(copies, 0)
            for (key, labels), copies in zip(few.items(), (copies_x, copies_y), strict=True)
        }
    weights = [copies.double() / copies.sum() for copies in (copies_x, copies_y)]
    expected, (of_x, of_y, _, _) = evaluate(function, (x, y, *weights), **options, **few)
    copied = x.repeat_interleave(copies_x, 0), y.repeat_interleave(copies_y, 0)
    value, gradients = evaluate(function, copied, **options, **many)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    for gradient, wanted, copies in zip(gradients, (of_x, of_y), (copies_x, copies_y), strict=True):
        total = torch.zeros_like(wanted).index_add(0, torch.arange(len(copies)).repeat_interleave(copies), gradient)
        torch.testing.assert_close(total, wanted, rtol=0, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"cost": "cosine"}, {"reach": 3.0}], ids=str)
def test_a_weight_of_zero_is_differentiated_at_its_point(options):
    """What a little mass there would add: so learned weights find their way back from zero."""
    x, y, a, b = clouds()
    y = y + 3  # The point is outside the box of its own cloud, on the way to the other one.
    a = torch.cat([a, a.new_zeros(1)])
    x = torch.cat([x, 0.5 * (x[:1] + y[:1])])
    _, (_, _, gradient, _) = evaluate(sinkhorn_divergence, (x, y, a, b), blur=0.5, tol=1e-7, **options)
    direction = a.new_zeros(13)
    direction[-1], direction[0] = 1, -1
    with torch.no_grad():
        ahead, now = (
            sinkhorn_divergence(x, y, a + step * direction, b, blur=0.5, tol=1e-7, **options) for step in (1e-6, 0)
        )
    torch.testing.assert_close(gradient @ direction, (ahead - now) / 1e-6, rtol=1e-4, atol=1e-6)


def test_second_derivatives_of_a_padded_cloud():
    x, y, a, b = clouds()
    far_x, far_a = padded(x, a, HERE_X, PADDING, 19)
    far_y, far_b = padded(y, b, HERE_Y, PADDING, 16)

    def penalty(*inputs):
        inputs = [each.clone().requires_grad_() for each in inputs]
        first = torch.autograd.grad(sinkhorn_divergence(*inputs, blur=0.5, tol=1e-9), inputs[:2], create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    expected, gradients = penalty(x, y, a, b), penalty(far_x, far_y, far_a, far_b)
    for gradient, wanted, here in zip(gradients, expected, (HERE_X, HERE_Y) * 2, strict=True):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient[here], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_padding_in_half_precision(dtype):
    x, y, a, b = clouds(dtype)
    points, weights = padded(y, b, HERE_Y, PADDING, 16)
    points.requires_grad_()
    value = sinkhorn_divergence(x, points, a, weights)
    assert torch.autograd.grad(value, points)[0].isfinite().all()
    torch.testing.assert_close(value, sinkhorn_divergence(x, y, a, b), rtol=1e-5, atol=0)


def test_a_weight_that_is_zero_in_the_dtype_of_the_points_is_zero():
    x, y, a, _ = clouds(torch.float32)
    a, tiny = a.double(), torch.full((1,), 1e-60, dtype=torch.float64)
    far = torch.cat([x, torch.full((1, 3), float("nan"))])
    torch.testing.assert_close(sinkhorn_divergence(far, y, torch.cat([a, tiny])), sinkhorn_divergence(x, y, a))
    with pytest.raises(ValueError, match="a sums to zero"):
        sinkhorn_divergence(far[-1:], y, tiny)


@pytest.mark.parametrize("function", [sinkhorn_divergence, sliced_wasserstein])
def test_what_has_weight_must_be_finite(function):
    x, y, a, b = clouds()
    a[3], b[2], y[2, 1] = 0, 0, float("nan")
    x[4, 0] = float("inf")
    with pytest.raises(ValueError, match=r"x \(12, 3\) holds NaN or infinite"):
        function(x, y, a / a.sum(), b / b.sum())
    with pytest.raises(ValueError, match=r"y \(9, 3\) holds NaN or infinite"):
        function(y.nan_to_num(), y, b / b.sum())
    labels = torch.full((12, 2), 0.5)
    labels[4] = float("nan")
    with pytest.raises(ValueError, match="x_labels of a floating dtype must be probabilities"):
        sinkhorn_divergence(x.nan_to_num(), x.nan_to_num(), label_cost=1.0, x_labels=labels, y_labels=labels)


# Rounding


@pytest.mark.parametrize("function", [sinkhorn_divergence, sliced_wasserstein])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softmax_in_half_precision(function, dtype):
    """Off by up to half a unit in the last place each; that is all of them, for 5 points and for 100,000."""
    rng = torch.Generator().manual_seed(0)
    points = torch.randn(5, 2, generator=rng)
    for _ in range(6):
        logits = torch.randn(2, 5, generator=rng)
        a, b = logits.to(dtype).softmax(-1)
        exact = function(points, points + 1, *((w.double() / w.double().sum()).float() for w in (a, b)))
        # The value is that of the mass that a has.
        torch.testing.assert_close(function(points, points + 1, a, b), exact, rtol=torch.finfo(dtype).eps, atol=0)
        function(points, points + 1, b=b)
    many = torch.full((100_000,), 1e-5).to(dtype)
    sliced_wasserstein(torch.zeros(100_000, 1), torch.ones(1, 1), many)


@pytest.mark.parametrize("function", [sinkhorn_divergence, sliced_wasserstein])
@pytest.mark.parametrize(
    ("dtype", "share", "explained"),
    [(torch.float32, 0.002, "0.001"), (torch.float16, 0.005, "0.002"), (torch.bfloat16, 0.03, "0.016")],
    ids=str,
)
def test_what_rounding_does_not_explain_is_refused(function, dtype, share, explained):
    x, y, a, b = clouds()
    a, b = a.to(dtype), (b * (1 + share)).to(dtype)
    with pytest.raises(
        ValueError, match=rf"equal sums, got 1\S* and 1\.\d+ .* of the mass apart .* explains {explained}"
    ):
        function(x.float(), y.float(), a, b)
