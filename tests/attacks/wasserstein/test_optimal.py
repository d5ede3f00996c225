"""Attacks against what is known in closed form: linear models, torch.autograd, the distributions of the starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.modules import batch, classifier

from lightning_wdefense.attacks import FGSM, PGD, ThreatModel, get_attack


def linear(features: int = 12, outputs: int = 2, seed: int = 0) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(features, outputs)


def normal_of(model: torch.nn.Linear) -> torch.Tensor:
    """Direction in which the margin of class 1 grows."""
    weight = model.weight.detach()
    return weight[1] - weight[0] if len(weight) == 2 else weight[0]


def margin_of(model, inputs, labels):
    z = model(inputs).detach()
    z = z[:, 1] - z[:, 0] if z.shape[1] == 2 else z[:, 0]
    return torch.where(labels == 1, z, -z)


ATTACKS = {
    "fgsm": lambda threat, **options: FGSM(threat, **options),
    "pgd": lambda threat, **options: PGD(threat, steps=40, step_size=threat.eps / 2, **options),
    "pgd-restarts": lambda threat, **options: PGD(threat, steps=20, step_size=threat.eps, restarts=3, **options),
    "pgd-clean-start": lambda threat, **options: PGD(threat, random_start=False, **options),
}


@pytest.mark.parametrize("build", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("outputs", [1, 2], ids=["one logit", "two logits"])
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_reaches_the_optimum_of_a_linear_model(build, loss, outputs, norm, dual):
    """The worst margin is eps times the dual norm of the weights below the clean one."""
    model, eps = linear(outputs=outputs), 0.3
    inputs, labels = torch.randn(16, 12), torch.arange(16) % 2
    adversarial = build(ThreatModel(norm=norm, eps=eps, bounds=None), loss=loss)(model, inputs, labels)
    drop = margin_of(model, inputs, labels) - margin_of(model, adversarial, labels)
    best = eps * normal_of(model).norm(p=dual)
    torch.testing.assert_close(drop, best.expand(16), rtol=2e-3, atol=0)


@pytest.mark.parametrize("build", ATTACKS.values(), ids=ATTACKS)
def test_reaches_the_optimum_inside_bounds(build):
    """In L-infinity with bounds each coordinate moves as far as the ball and the box let it."""
    model, eps = linear(), 0.3
    inputs, labels = torch.rand(16, 12), torch.arange(16) % 2
    direction = -torch.where(labels == 1, 1.0, -1.0)[:, None] * normal_of(model).sign()
    best = (inputs + eps * direction).clamp(0, 1)
    adversarial = build(ThreatModel(norm="linf", eps=eps))(model, inputs, labels)
    torch.testing.assert_close(adversarial, best, atol=1e-6, rtol=0)


@pytest.mark.parametrize("std", [None, (0.1, 0.5, 2.0)], ids=["data units", "normalised"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_follows_autograd_in_data_units(norm, std):
    mean = None if std is None else (0.5, 0.2, 0.1)
    threat = ThreatModel(norm=norm, eps=0.5, bounds=None, mean=mean, std=std)
    model = classifier(3, 4, 4)
    inputs, _ = batch(3, 4, 4)
    labels = torch.arange(8) % 5
    attack = PGD(threat, steps=1, step_size=0.1, random_start=False)
    shift, scale = (torch.tensor(s).view(1, 3, 1, 1) if s else d for s, d in ((mean, 0.0), (std, 1.0)))
    data = (inputs * scale + shift).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model((data - shift) / scale), labels, reduction="sum"), data)
    step = gradient.sign() if norm == "linf" else gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = (data.detach() + 0.1 * step - shift) / scale
    torch.testing.assert_close(attack(model, inputs, labels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        ("ce", lambda z, clean, y: F.cross_entropy(z, y, reduction="sum")),
        ("margin", lambda z, clean, y: (z - 1e9 * F.one_hot(y, 5)).amax(1).sum() - z.gather(1, y[:, None]).sum()),
        ("kl", lambda z, clean, y: F.kl_div(z.log_softmax(1), clean.softmax(1), reduction="sum")),
        (lambda z, y: F.mse_loss(z[:, 0], y.float(), reduction="none"), lambda z, clean, y: ((z[:, 0] - y) ** 2).sum()),
    ],
    ids=["ce", "margin", "kl", "callable"],
)
def test_losses_have_the_gradients_of_their_formulas(loss, reference):
    model = classifier(6)
    inputs, _ = batch(6)
    labels = torch.arange(8) % 5
    # So wide that the start is far from the clean inputs, where the two divergences have one gradient.
    threat = ThreatModel(norm="linf", eps=4.0, bounds=(-250.0, 250.0))
    attack = PGD(threat, steps=1, step_size=0.01, random_start="gaussian", loss=loss)
    noise = 0.5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    start = (inputs + noise).requires_grad_()
    (gradient,) = torch.autograd.grad(reference(model(start), model(inputs).detach(), labels), start)
    torch.testing.assert_close(attack(model, inputs, labels), start.detach() + 0.01 * gradient.sign())


def test_n_fgsm_is_its_formula():
    model, eps = classifier(6), 0.1
    inputs, labels = batch(6)
    noise = 2 * eps * (2 * torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) - 1)
    start = (inputs + noise).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), labels), start)
    expected = (start + eps * gradient.sign()).clamp(0, 1).detach()
    torch.testing.assert_close(get_attack("n-fgsm", ThreatModel(eps=eps))(model, inputs, labels), expected)


def _start(norm: str, random_start, dim: int = 3, n: int = 4000) -> torch.Tensor:
    """Where PGD starts: steps too small to matter."""
    attack = PGD(ThreatModel(norm=norm, eps=2.0, bounds=None), steps=1, step_size=1e-9, random_start=random_start)
    return attack(linear(dim), torch.zeros(n, dim), torch.zeros(n, dtype=torch.long))


def test_starts_are_uniform_in_the_ball():
    linf = _start("linf", True).flatten()
    assert linf.abs().max() <= 2
    torch.testing.assert_close(linf.sort().values, torch.linspace(-2, 2, len(linf)), atol=0.06, rtol=0)
    share = (_start("l2", True).norm(dim=1).sort().values / 2) ** 3  # the share of the volume inside the radius
    torch.testing.assert_close(share, torch.linspace(0, 1, len(share)), atol=0.04, rtol=0)


def test_gaussian_start_has_the_deviation_of_trades():
    start = _start("linf", "gaussian")
    assert start.std().item() == pytest.approx(0.001, rel=0.05)
    inputs = torch.full((4000, 3), 127.0)
    threat = ThreatModel(norm="linf", eps=8.0, bounds=(0, 255))
    attack = PGD(threat, steps=1, step_size=1e-6, random_start="gaussian")
    moved = attack(linear(3), inputs, torch.zeros(4000, dtype=torch.long)) - inputs
    assert moved.std().item() == pytest.approx(0.255, rel=0.05), "the deviation must follow the range of the data"


@pytest.mark.parametrize("loss", ["ce", "margin", "kl", lambda z, y: -z.gather(1, y[:, None])])
def test_each_restart_only_makes_it_worse(loss):
    model = classifier(20, scale=6.0)
    inputs, labels = batch(20, model=model, n=64)
    clean = model(inputs)

    def values(adversarial):
        with torch.no_grad():
            z = model(adversarial)
            if loss == "kl":
                return F.kl_div(z.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
            if loss == "margin":
                return (z - 1e9 * F.one_hot(labels, 5)).amax(1) - z.gather(1, labels[:, None]).squeeze(1)
            if loss == "ce":
                return F.cross_entropy(z, labels, reduction="none")
            return loss(z, labels).squeeze(1)

    def attack(restarts):
        return PGD(ThreatModel(eps=0.1), steps=2, restarts=restarts, loss=loss)(model, inputs, labels)

    one, many = attack(1), attack(6)
    if callable(loss) or loss == "kl":
        assert (values(many) >= values(one) - 1e-6).all()
        assert (values(many) > values(one) + 1e-3).any()
        return
    right_one, right_many = (model(found).argmax(1) == labels for found in (one, many))
    assert not (right_many & ~right_one).any()
    assert right_many.sum() < right_one.sum(), "the case is too easy or too hard to show anything"
    assert torch.equal(many[~right_one], one[~right_one])
    assert (values(many) >= values(one) - 1e-6)[right_many].all()


def test_default_step_is_two_and_a_half_radii_over_the_steps():
    model, threat = classifier(12, scale=6.0), ThreatModel(norm="linf", eps=0.4, bounds=None)
    inputs, labels = batch(12)
    explicit, other = (PGD(threat, steps=10, step_size=size)(model, inputs, labels) for size in (0.1, 0.4))
    assert torch.equal(PGD(threat, steps=10)(model, inputs, labels), explicit)
    assert not torch.equal(explicit, other)


def test_a_step_size_keeps_its_ratio_to_the_radius():
    attack = PGD(ThreatModel(eps=0.4), step_size=0.1)
    assert attack.with_eps(0.2).step_size == pytest.approx(0.05)
    assert attack.with_eps(0.0).step_size == 0.1
    assert PGD(ThreatModel(eps=0.4)).with_eps(0.2).step_size is None
