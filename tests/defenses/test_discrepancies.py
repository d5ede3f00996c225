"""Discrepancies between clean and adversarial features, against closed forms and exact transport."""

from __future__ import annotations

import ot
import pytest
import torch

from lightning_wdefense.defenses import DISCREPANCIES, ClassTransport, get_discrepancy
from lightning_wdefense.defenses.branch import Branch
from lightning_wdefense.defenses.critic import CriticDiscrepancy, OnlineCritic
from lightning_wdefense.transport import SlicedWasserstein

N, D, CLASSES = 12, 3, 3


@pytest.fixture
def clouds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = x + 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return x, y, torch.arange(N) % CLASSES


def half_squares(x, y):
    return (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(2) / 2


@pytest.mark.parametrize("name", [name for name, each in DISCREPANCIES.items() if callable(each)])
class TestEveryDiscrepancy:
    def test_is_a_scalar_with_gradients_on_both_sides(self, name, clouds):
        x, y, labels = clouds
        x, y = x.requires_grad_(), y.requires_grad_()
        value = get_discrepancy(name)(x, y, labels)
        assert value.shape == ()
        for gradient in torch.autograd.grad(value, (x, y)):
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0

    def test_half_precision_is_computed_in_float32(self, name, clouds):
        x, y, labels = clouds
        exact = get_discrepancy(name)(x.bfloat16().float(), y.bfloat16().float(), labels)
        half = get_discrepancy(name)(x.bfloat16(), y.bfloat16(), labels)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, rtol=1e-3, atol=1e-5)

    def test_one_sample(self, name):
        x = torch.tensor([[1.0, 2.0, 0.5]])
        assert torch.isfinite(get_discrepancy(name)(x, x + 0.1, torch.tensor([1])))


@pytest.mark.parametrize("name", ["kl", "weighted-kl", "paired-l2", "coral", "sliced"])
def test_finite_differences(name, clouds):
    """Of those without a bandwidth or a blur, which follow the data but are constants for the gradient."""
    x, y, labels = clouds
    measure, scale = get_discrepancy(name), 1e-5
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(measure(x, y.requires_grad_(), labels), y)
    y = y.detach()
    slope = (measure(x, y + scale * direction, labels) - measure(x, y - scale * direction, labels)) / (2 * scale)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


class TestSlicedTransport:
    def test_a_translation_costs_half_its_square_by_dimensions(self, clouds):
        x, _, labels = clouds
        measure = get_discrepancy(SlicedWasserstein(n_projections=D))
        assert measure(x, x + 2.0, labels).item() == pytest.approx(2.0)
        x, t = x.reshape(N, D, 1, 1), torch.tensor([0.0, 3.0, 0.0]).reshape(D, 1, 1)
        assert measure(x, x + t, labels).item() == pytest.approx(1.5)


class TestClassTransport:
    def test_without_blur_is_exact_transport_inside_the_classes(self, clouds):
        x, y, labels = clouds
        exact = 0.0
        for label in range(CLASSES):
            own = labels == label
            exact += float(own.double().mean()) * ot.emd2([], [], half_squares(x[own], y[own]).numpy())
        value = ClassTransport(relative_blur=0.02)(x, y, labels)
        # The entropy of the plan is of the order of blur squared times the logarithm of the number of samples.
        assert float(value) == pytest.approx(exact, rel=0.02)

    def test_with_a_large_blur_draws_towards_the_mean_of_the_class(self, clouds):
        x, y, labels = clouds
        y = y.requires_grad_()
        (gradient,) = torch.autograd.grad(ClassTransport(relative_blur=50.0, relative_label_cost=1e6)(x, y, labels), y)
        means = torch.stack([x[labels == label].mean(0) for label in range(CLASSES)])
        torch.testing.assert_close(gradient, (y.detach() - means[labels]) / N, rtol=1e-3, atol=1e-5)

    def test_where_the_other_classes_are_does_not_matter(self, clouds):
        x, y, labels = clouds
        far = torch.where(labels == 2, 10.0, 0.0).unsqueeze(1)
        measure = ClassTransport(relative_blur=0.004)
        torch.testing.assert_close(measure(x + far, y + far, labels), measure(x, y, labels), rtol=0.05, atol=1e-3)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_grows_with_the_square_of_the_scale(self, scale, clouds):
        x, y, labels = clouds
        torch.testing.assert_close(
            ClassTransport()(scale * x, scale * y, labels), scale**2 * ClassTransport()(x, y, labels)
        )

    def test_draws_a_sample_towards_its_class_even_where_it_was(self, clouds):
        """What pairing and the divergence do not: without an attack there is still something to gain."""
        x, _, labels = clouds
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ClassTransport()(x, y, labels), y)
        assert gradient.abs().max() > 1e-3
        for name in ("paired-l2", "sinkhorn"):
            (gradient,) = torch.autograd.grad(get_discrepancy(name)(x, y, labels), y)
            assert gradient.abs().max() < 1e-3

    def test_probabilities_of_a_single_output(self, clouds):
        x, y, _ = clouds
        labels = torch.arange(N) % 2
        torch.testing.assert_close(ClassTransport()(x, y, labels.double()), ClassTransport()(x, y, labels))

    @pytest.mark.parametrize("name", ["class-transport", "sinkhorn-label"])
    @pytest.mark.parametrize(
        ("labels", "found"),
        [
            (torch.zeros(N, 2, 2, dtype=torch.long), r"\(12, 2, 2\)"),
            (torch.arange(N - 1), r"\(11,\)"),
            (torch.linspace(-3, 3, N), "not probabilities"),
            (torch.linspace(0, 1, N)[:, None], "not probabilities"),
            (torch.tensor([[1.0, 0, 1]]).expand(N, -1), "not probabilities"),
            (None, "NoneType"),
        ],
        ids=["pixels", "too few", "regression", "regression in 0..1", "several labels", "none"],
    )
    def test_labels_that_are_no_classes_are_explained(self, name, labels, found, clouds):
        x, y, _ = clouds
        with pytest.raises(ValueError, match=f"{found}.*'paired-l2'"):
            get_discrepancy(name)(x, y, labels)

    def test_collapsed_features(self):
        x = torch.zeros(4, 2, requires_grad=True)
        value = ClassTransport()(x, x.detach(), torch.tensor([0, 0, 1, 1]))
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


@pytest.mark.parametrize("penalty", [0.05, 5.0])
def test_a_weak_penalty_of_the_critic_pulls_no_harder_than_a_strong_one(penalty):
    """Two clouds at a distance of 2: a penalty of 0.05 lets the critic's own gap come to more than ten times that."""
    live = OnlineCritic(CriticDiscrepancy("gradient-penalty", penalty, lr=0.1, by_class=False))
    y = torch.randn(128, 4, generator=torch.Generator().manual_seed(0))
    x = y + torch.tensor([2.0, 0.0, 0.0, 0.0])
    for _ in range(100):
        said = live.update(Branch(None, x), Branch(None, y), None, measure=True)
    assert live.gap(Branch(None, x), Branch(None, y), None).item() == pytest.approx(2, rel=0.15)
    assert said["critic_gap"] > 2 * (1 + 1 / (4 * penalty))


def test_the_critic_learns_nothing_from_the_models_loss(clouds):
    x, y, _ = clouds
    live = OnlineCritic(CriticDiscrepancy(by_class=False))
    live.update(Branch(None, x), Branch(None, y), None)
    assert live._training is not None
    before = [each.grad for each in live._training.critic.parameters()]
    live.gap(Branch(None, x.requires_grad_()), Branch(None, y), None).backward()
    assert x.grad.abs().max() > 0
    assert [each.grad for each in live._training.critic.parameters()] == before == [None] * len(before)
