import numpy as np
import pytest
import torch

from lightning_wdefense.metrics import TransportShift
from lightning_wdefense.transport import sinkhorn_divergence


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_no_attack_is_no_shift():
    clean = features(0, 50, 6)
    assert TransportShift()(clean, clean).item() == pytest.approx(0, abs=1e-4)


def test_translation_costs_half_its_square():
    clean, move = features(0, 60, 5), torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0])
    expected = move.square().sum().item() / 2
    assert TransportShift(tol=1e-5)(clean, clean + move).item() == pytest.approx(expected, rel=1e-3)


def test_order_of_the_attacked_samples_does_not_matter():
    clean, adversarial = features(0, 40, 3), features(1, 40, 3) + 1
    shuffled = adversarial[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    expected = TransportShift(tol=1e-5)(clean, adversarial)
    torch.testing.assert_close(TransportShift(tol=1e-5)(clean, shuffled), expected, rtol=1e-3, atol=1e-5)


def test_against_exact_transport_at_a_small_blur():
    ot = pytest.importorskip("ot")
    clean, adversarial = features(0, 40, 2), 0.5 * features(1, 40, 2) + 1
    weights = np.full(40, 1 / 40)
    exact = ot.emd2(weights, weights, ot.dist(clean.numpy(), adversarial.numpy())) / 2
    assert TransportShift(blur=0.05)(clean, adversarial).item() == pytest.approx(exact, rel=0.02)


def test_hands_its_options_on():
    clean, adversarial, labels = features(0, 30, 2, 4), features(1, 30, 2, 4), torch.arange(30) % 3
    options = {"relative_blur": 0.4, "label_cost": 2.0, "tol": 1e-4}
    expected = sinkhorn_divergence(
        clean.flatten(1), adversarial.flatten(1), x_labels=labels, y_labels=labels, **options
    )
    torch.testing.assert_close(TransportShift(**options)(clean, adversarial, labels), expected)
    torch.testing.assert_close(TransportShift()(clean, adversarial, labels), TransportShift()(clean, adversarial))
    assert TransportShift(blur=0.5)(clean, adversarial) != TransportShift()(clean, adversarial)


@pytest.mark.parametrize("how", ["update", "forward"])
def test_keeps_the_first_pairs_only(how):
    clean, adversarial = features(0, 90, 3), features(1, 90, 3) + 1
    metric = TransportShift(max_samples=50)
    for start in range(0, 90, 30):
        getattr(metric, how)(clean[start : start + 30], adversarial[start : start + 30])
    assert sum(part.numel() for part in metric.clean) == 50 * 3
    torch.testing.assert_close(metric.compute(), TransportShift()(clean[:50], adversarial[:50]))
    metric.reset()
    metric.update(features(2, 5, 7), features(3, 5, 7))  # after a reset another width is fine


def test_holds_neither_the_callers_memory_nor_its_graph():
    clean, adversarial = features(0, 20, 3).requires_grad_(), features(1, 20, 3)
    metric = TransportShift()
    metric.update(clean, adversarial)
    before = metric.clone().compute()
    adversarial.zero_()
    torch.testing.assert_close(metric.compute(), before)
    assert not metric.clean[0].requires_grad


def test_in_a_half_precision_module():
    clean, adversarial, labels = features(0, 400, 3).bfloat16(), features(1, 400, 3).bfloat16() + 1, torch.arange(400)
    metric = TransportShift(label_cost=1.0)
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    metric.update(clean, adversarial, labels)
    assert metric.labels[0].equal(labels)
    expected = TransportShift(label_cost=1.0)(clean.float(), adversarial.float(), labels)
    torch.testing.assert_close(metric.compute(), expected)


def test_value_of_a_batch_has_a_gradient():
    clean, adversarial = features(0, 20, 3), (features(1, 20, 3) + 1).requires_grad_()
    TransportShift()(clean, adversarial).backward()
    assert torch.isfinite(adversarial.grad).all()
    assert adversarial.grad.abs().sum() > 0
