"""The attacks made for training, against closed forms, exact transport and the objectives they stand for."""

from __future__ import annotations

import math
from dataclasses import replace

import ot
import pytest
import torch
import torch.nn.functional as F
from support.modules import batch, classifier

from lightning_wdefense.attacks import PGD, FeatureScattering, GibbsNoise, LagrangianAttack, SoftBallPGD, ThreatModel
from lightning_wdefense.transport import SinkhornDivergence

LINF, L2 = ThreatModel(norm="linf", eps=0.1), ThreatModel(norm="l2", eps=0.4)
norms = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def identity(inputs):
    return inputs


# --- soft ball


@norms
@pytest.mark.parametrize("multiplier", [1.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"loss": "kl", "random_start": "gaussian"}, {"restarts": 2}], ids=str)
def test_a_ball_with_a_full_multiplier_is_hard(threat, multiplier, options):
    model = classifier(3, 6, 6)
    inputs, labels = batch(3, 6, 6)
    soft = SoftBallPGD(threat, multiplier=multiplier, **options)
    assert torch.equal(soft(model, inputs, labels), PGD(threat, **options)(model, inputs, labels))


@norms
@pytest.mark.parametrize("multiplier", [0.0, 0.3])
def test_the_soft_ball_is_its_formula(threat, multiplier):
    """A constant gradient of ones: each step adds, and each step pulls back a share of what is outside."""
    threat = replace(threat, bounds=None)
    attack = SoftBallPGD(
        threat, steps=4, step_size=threat.eps, random_start=False, loss=lambda z, _: z.sum(1), multiplier=multiplier
    )
    length = 0.0
    for _ in range(4):
        length += threat.eps
        length -= multiplier * max(length - threat.eps, 0.0)
    moved = attack(identity, torch.zeros(2, 9))
    expected = length / (3 if threat.norm == "l2" else 1)
    torch.testing.assert_close(moved, torch.full((2, 9), expected))
    if multiplier == 0:
        torch.testing.assert_close(threat.ball.length(moved), torch.full((2,), 4 * threat.eps))


def test_a_softer_ball_lets_farther_out():
    model = classifier(3, 6, 6)
    inputs, labels = batch(3, 6, 6)
    reached = [
        float((SoftBallPGD(L2, multiplier=m)(model, inputs, labels) - inputs).flatten(1).norm(dim=1).mean())
        for m in (0.0, 0.1, 0.5, 1.0)
    ]
    assert reached == sorted(reached, reverse=True)
    assert reached[0] > 1.5 * reached[-1]


def test_displacement_is_measured_in_data_units():
    mean, std = (0.5, 0.4), (0.2, 0.1)
    delta = torch.tensor([[[0.1, -0.3]], [[0.0, 0.4]]]).reshape(2, 2, 1)
    for norm, expected in (("linf", 0.2), ("l2", (math.sqrt(0.1) + 0.4) / 2)):
        attack = SoftBallPGD(ThreatModel(norm=norm, eps=0.1, mean=mean, std=std))
        inputs = torch.rand(2, 2, 1)
        adversarial = (inputs + delta / torch.tensor(std).reshape(1, 2, 1)).requires_grad_()
        got = attack.displacement(inputs, adversarial)
        assert got.shape == ()
        assert not got.requires_grad
        assert got.item() == pytest.approx(expected, rel=1e-4)


def test_the_multiplier_ascends_and_stays_above_zero():
    attack = SoftBallPGD(LINF, multiplier=0.5, multiplier_rate=1.0)
    assert attack.updated_multiplier(0.3) == pytest.approx(0.7)
    assert attack.updated_multiplier(torch.tensor(0.05)) == pytest.approx(0.45)
    assert isinstance(attack.updated_multiplier(torch.tensor(0.05)), float)
    assert replace(attack, multiplier=0.02).updated_multiplier(0.0) == 0.0
    assert math.isnan(attack.updated_multiplier(math.nan)), "training must see that it went wrong"


def test_the_multiplier_finds_the_radius():
    """Learned on one batch, the average displacement ends at the radius."""
    model = classifier(3, 6, 6)
    inputs, labels = batch(3, 6, 6)
    attack = SoftBallPGD(L2, step_size=0.2, multiplier=0.0, multiplier_rate=0.2)
    for _ in range(60):
        displacement = attack.displacement(inputs, attack(model, inputs, labels))
        attack = replace(attack, multiplier=attack.updated_multiplier(displacement))
    assert displacement.item() == pytest.approx(L2.eps, rel=0.1)


# --- penalised


def linear_loss(outputs, slopes):
    return (outputs * slopes).sum(1)


@norms
@pytest.mark.parametrize("std", [None, 0.25], ids=["data units", "normalised"])
def test_lagrangian_solves_a_linear_loss(threat, std):
    """The maximiser of g x' - gamma |x' - x|^2 is x + g / (2 gamma), clamped, whatever the norm."""
    threat = replace(threat, std=std)
    data, slopes = torch.rand(8, 6), torch.randn(8, 6)
    attack = LagrangianAttack(threat, gamma=2.0, loss=linear_loss)
    got = threat.to_data(attack(threat.to_data, threat.to_model(data), slopes))
    torch.testing.assert_close(got, (data + slopes / 4).clamp(0, 1))
    assert (got == 0).any()
    assert (got == 1).any()


@pytest.mark.parametrize("step_size", [None, 0.1])
def test_lagrangian_solves_a_concave_loss(step_size):
    """-h |x' - c|^2 / 2 - gamma |x' - x|^2 is largest at (h c + 2 gamma x) / (h + 2 gamma)."""
    data, centres, h, gamma = torch.rand(8, 6), 2 * torch.rand(8, 6) - 0.5, 3.0, 2.0
    attack = LagrangianAttack(
        ThreatModel(), gamma=gamma, steps=40, step_size=step_size, loss=lambda z, c: -h * (z - c).square() / 2
    )
    best = ((h * centres + 2 * gamma * data) / (h + 2 * gamma)).clamp(0, 1)
    torch.testing.assert_close(attack(identity, data, centres), best, atol=1e-4, rtol=0)


@pytest.mark.parametrize("gamma", [0.5, 5.0, None])
def test_lagrangian_raises_the_penalised_loss(gamma):
    model = classifier(6)
    inputs, labels = batch(6)
    found = LagrangianAttack(L2, gamma=gamma)(model, inputs, labels)
    gamma = gamma or 1 / (2 * L2.eps)
    before, after = (F.cross_entropy(model(x), labels, reduction="none") for x in (inputs, found))
    assert (after - gamma * (found - inputs).square().sum(1) > before).all()


@norms
def test_lagrangian_default_moves_a_unit_gradient_to_the_edge(threat):
    slopes = F.normalize(torch.randn(8, 9), dim=1)
    moved = LagrangianAttack(replace(threat, bounds=None), loss=linear_loss)(identity, torch.zeros(8, 9), slopes)
    edge = threat.eps * (3 if threat.norm == "linf" else 1)
    torch.testing.assert_close(moved, edge * slopes)


@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, {"gamma": 2.0, "step_size": 0.1}], ids=str)
def test_lagrangian_displacement_scales_with_the_radius(options):
    data, slopes = torch.zeros(8, 6), torch.randn(8, 6)
    attack = LagrangianAttack(ThreatModel(eps=0.4, bounds=None), loss=linear_loss, **options)
    full, half = attack(identity, data, slopes), attack.with_eps(0.2)(identity, data, slopes)
    torch.testing.assert_close(half, full / 2)
    assert torch.equal(attack.with_eps(0.0)(identity, data, slopes), data)
    assert attack.with_eps(0.0).with_eps(0.4) == attack


def test_lagrangian_in_float16():
    """Gradients near 1e-8, which float16 does not hold, with a price as small."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    inputs, labels = torch.rand(8, 6), torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([19.0, 0.0, 0.0]))
    attack = LagrangianAttack(ThreatModel(bounds=None), gamma=1e-8, steps=1)
    expected = attack(model, inputs, labels)
    moved = expected - inputs
    assert moved.abs().max() > 0.05
    with torch.autocast("cpu", torch.float16):
        got = attack(model, inputs, labels)
    torch.testing.assert_close(got - inputs, moved, rtol=0.1, atol=0.02 * float(moved.abs().max()))


# --- feature scattering


def exact_cost(x, y):
    x, y = (z.detach().double() for z in (x, y))
    return ot.emd2([], [], (torch.cdist(x, y).square() / 2).numpy())


@norms
@pytest.mark.parametrize("divergence", [None, SinkhornDivergence(cost="cosine")], ids=["default", "cosine"])
def test_scattering_raises_the_exact_transport_cost(threat, divergence):
    model = classifier(3, 6, 6)
    inputs, _ = batch(3, 6, 6, n=24)
    clean = model(inputs)
    options = {} if divergence is None else {"divergence": divergence}

    def cost(adversarial):
        logits = model(adversarial)
        return exact_cost(*(F.normalize(z, dim=1) if divergence else z for z in (clean, logits)))

    one, ten = (FeatureScattering(threat, steps=steps, **options)(model, inputs) for steps in (1, 10))
    size = (one - inputs).abs() if threat.norm == "linf" else (one - inputs).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    noise = threat.ball.steepest(torch.randn_like(inputs)) * size
    assert cost(one) > 2 * cost((inputs + noise).clamp(0, 1))
    assert cost(ten) > 1.02 * cost(one)


def test_scattering_takes_its_step_along_the_gradient():
    model = classifier(6)
    inputs, _ = batch(6)
    threat = replace(LINF, bounds=None)
    start = threat.ball.uniform(inputs, threat.eps, torch.Generator().manual_seed(0)) + inputs
    start.requires_grad_()
    divergence = SinkhornDivergence(blur=0.5)
    (gradient,) = torch.autograd.grad(divergence(model(inputs), model(start)), start)
    expected = threat.project(start.detach() + 0.03 * gradient.sign(), inputs, threat.box(inputs))
    got = FeatureScattering(threat, step_size=0.03, divergence=divergence)(model, inputs)
    torch.testing.assert_close(got, expected)


def test_scattering_steps():
    model = classifier(6)
    inputs, _ = batch(6)
    for steps, step_size in ((1, 0.1), (5, 0.05)):
        explicit = FeatureScattering(LINF, steps=steps, step_size=step_size)
        assert torch.equal(FeatureScattering(LINF, steps=steps)(model, inputs), explicit(model, inputs))
    assert explicit.with_eps(0.2).step_size == pytest.approx(0.1)
    assert explicit.with_eps(0.0).step_size == 0.05


@pytest.mark.parametrize("column", [True, False], ids=["(N, 1)", "(N,)"])
@pytest.mark.parametrize("n", [1, 8])
def test_scattering_of_a_single_logit(column, n):
    two = classifier(6, classes=2)
    inputs, _ = batch(6, model=two, n=n)

    def model(x):
        z = two(x)[:, 1:]
        return z if column else z.squeeze(1)

    moved = model(FeatureScattering(LINF, steps=3)(model, inputs)) - model(inputs)
    assert (moved.abs() > 0.01).all()


def test_scattering_forwards_the_clean_batch_once():
    calls = []
    model = classifier(6)
    inputs, _ = batch(6)
    FeatureScattering(LINF, steps=3)(lambda x: calls.append(x) or model(x), inputs)
    assert len(calls) == 4


def test_scattering_in_float16_whatever_the_batch():
    """The share of one sample in a mean over thousands is less than float16 holds."""
    model = torch.nn.Linear(2, 2, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(1e-4 * torch.eye(2))
    inputs = torch.rand(4096, 2).half()
    attack = FeatureScattering(LINF, step_size=1e-9, divergence=lambda x, y: (x - y).square().sum(1).mean())
    start = attack(model, inputs)
    moved = replace(attack, step_size=0.2)(model, inputs) - inputs
    inside = ((inputs > 0.1) & (inputs < 0.9)).all(1)
    assert (start - inputs).abs().mean() < 0.06
    assert (moved[inside].abs() > 0.099).float().mean() > 0.95


# --- Gibbs noise


def square_loss(outputs, labels):
    return outputs.square().sum(1)


def stream(inputs, spread, copies):
    """The copies that an attack of seed 0 draws, ``(copies, N, D)``."""
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(copies):
        drawn.append(inputs + spread * torch.randn(inputs.shape, generator=generator))
        torch.rand(len(inputs), generator=generator)  # decides about the copy
    return torch.stack(drawn)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
def test_gibbs_noise_picks_with_the_weights_of_the_softmax(temperature):
    """How often the copy with the smallest, second smallest... weight is picked, over many samples, against the mean weight."""
    n, copies = 20_000, 4
    inputs = torch.zeros(n, 3)
    attack = GibbsNoise(ThreatModel(eps=0.5, bounds=None), temperature=temperature, copies=copies, loss=square_loss)
    picked = attack(identity, inputs)
    drawn = stream(inputs, 0.5, copies)
    index = (drawn - picked).abs().sum(2).argmin(0)
    torch.testing.assert_close(drawn[index, torch.arange(n)], picked)
    weights = (drawn.square().sum(2) / temperature).softmax(0)
    order = weights.argsort(0)
    expected = weights.gather(0, order).mean(1)
    counts = (order == index).float().mean(1)
    torch.testing.assert_close(counts, expected, atol=4 * 0.5 / math.sqrt(n), rtol=0)


def test_gibbs_noise_estimates_the_gradient_of_sinkhorn_robust_optimisation():
    """The mean gradient at the picked copies is that of temperature * log mean exp(loss / temperature)."""
    n, copies, temperature = 20_000, 6, 0.3
    inputs, labels = batch(4, model=classifier(4, classes=3), n=1)
    inputs, labels = inputs.expand(n, 4), labels.expand(n)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    attack = GibbsNoise(ThreatModel(bounds=None), spread=1.0, temperature=temperature, copies=copies)
    picked = attack(model, inputs, labels)
    estimate = torch.autograd.grad(F.cross_entropy(model(picked), labels), list(model.parameters()))
    drawn = stream(inputs, 1.0, copies)
    losses = torch.stack([F.cross_entropy(model(copy), labels, reduction="none") for copy in drawn])
    objective = temperature * ((losses / temperature).logsumexp(0) - math.log(copies)).mean()
    exact = torch.autograd.grad(objective, list(model.parameters()), retain_graph=True)
    plain = torch.autograd.grad(losses.mean(), list(model.parameters()))
    for got, expected, unweighted in zip(estimate, exact, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0)
        assert (unweighted - expected).abs().max() > 0.1, "any copy would do"


def test_gibbs_noise_builds_a_graph_once_and_sees_one_copy_at_a_time():
    seen = []

    def model(x):
        seen.append((len(x), torch.is_grad_enabled()))
        return classifier(6)(x).detach()

    inputs, labels = batch(6)
    GibbsNoise(LINF, copies=5)(model, inputs, labels)
    assert seen == [(8, True), *[(8, False)] * 4]


@pytest.mark.parametrize(
    "loss", [lambda z, y: (z.argmax(1) != y).long(), "kl", "margin"], ids=["errors", "kl", "margin"]
)
def test_gibbs_noise_takes_losses_without_a_gradient(loss):
    model = classifier(6)
    inputs, labels = batch(6, n=64)
    picked, plain = (GibbsNoise(LINF, spread=0.3, temperature=t, loss=loss)(model, inputs, labels) for t in (1e-3, 1e6))
    wrong = [(model(x).argmax(1) != labels).float().mean() for x in (picked, plain)]
    assert wrong[0] > wrong[1] + 0.1


def test_gibbs_noise_ignores_copies_whose_loss_is_not_a_number():
    inputs = torch.full((200, 1), 0.5)
    picked = GibbsNoise(LINF, loss=lambda z, _: torch.where(z > 0.5, torch.nan, 1.0))(identity, inputs)
    assert (picked <= 0.5).all()
    never = GibbsNoise(LINF, loss=lambda z, _: z * torch.nan)(identity, inputs)
    assert torch.equal(never, inputs)


def test_gibbs_noise_is_judged_inside_the_bounds():
    seen = []
    GibbsNoise(LINF, spread=1.0)(lambda x: seen.append(x) or x, torch.rand(8, 3), torch.zeros(8, dtype=torch.long))
    assert all(((x >= 0) & (x <= 1)).all() for x in seen)


def test_gibbs_noise_spread():
    inputs = torch.full((5000, 1), 0.5)
    attack = GibbsNoise(ThreatModel(eps=0.05, std=0.5), copies=1)
    moved = attack(lambda x: x.repeat(1, 3), attack.threat.to_model(inputs), torch.zeros(5000).long()) * 0.5 - 0.5
    assert moved.std().item() == pytest.approx(0.05, rel=0.05)
    assert attack.with_eps(0.1).spread is None
    assert replace(attack, spread=0.2).with_eps(0.1).spread == pytest.approx(0.4)
    assert replace(attack, spread=0.2).with_eps(0.0).spread == 0.0
