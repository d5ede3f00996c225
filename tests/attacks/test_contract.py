"""What every attack promises, tested for each line of the table."""

from __future__ import annotations

import copy
import pickle
import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attacks import ATTACK_CASES, OWN_CASES, AttackCase
from support.modules import Nasty, Snapshot, batch, classifier

from lightning_wdefense.attacks import PGD, ThreatModel, WassersteinAttack, wasserstein_feasibility

every_attack = pytest.mark.parametrize("case", ATTACK_CASES.values(), ids=ATTACK_CASES)
own_attacks = pytest.mark.parametrize("case", OWN_CASES.values(), ids=OWN_CASES)
LINF = ThreatModel(norm="linf", eps=0.2)
L2 = ThreatModel(norm="l2", eps=0.8)
norms = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def assert_legal(case: AttackCase, threat: ThreatModel, adversarial, inputs, tol: float = 1e-6):
    """Inside the bounds and, if bounded, inside the ball; ``tol`` is relative to the bounds' range."""
    assert torch.isfinite(adversarial).all()
    if case.transports:
        assert_transported(case(threat), adversarial, inputs)
        return
    to_data = lambda x: threat.to_data(x.double())  # noqa: E731
    data, clean = to_data(adversarial), to_data(inputs)
    if threat.bounds is not None:
        low, high = threat.bounds
        tol = tol * (high - low)
        assert data.min() >= low - tol
        assert data.max() <= high + tol
    if case(threat).bounded:
        assert threat.ball.length(data - clean).max() <= threat.eps + tol


def assert_transported(attack: WassersteinAttack, adversarial, inputs):
    """The mass of each channel, the bounds, and what the exact plan costs, up to 1e-5 of each or what the dtype can tell apart."""
    threat, options = attack.threat, {"neighbourhood": attack.neighbourhood, "p": attack.p}
    tol = max(1e-5, 2 * torch.finfo(inputs.dtype).eps)
    found = wasserstein_feasibility(inputs, adversarial, threat, **options)
    assert found.mass.max() <= tol, found.mass
    assert found.box.max() <= tol, found.box
    if tol > 1e-5:  # no plan explains a change of mass, so undo that first
        data, clean = (threat.to_data(x.double()) for x in (adversarial, inputs))
        data = data * (clean.sum((2, 3), keepdim=True) / data.sum((2, 3), keepdim=True))
        found = wasserstein_feasibility(threat.to_model(clean), threat.to_model(data), threat, **options)
    assert (found.cost**attack.p <= threat.eps**attack.p * (1 + 1e-5) + (tol if tol > 1e-5 else 1e-6)).all(), found.cost


# --- the model is left as it was


@every_attack
@norms
def test_leaves_a_nasty_module_as_it_was(case, threat):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    model = Nasty(36)
    inputs, labels = torch.rand(8, 1, 6, 6), torch.arange(8) % 5
    kept, snapshot = inputs.clone(), Snapshot(model)
    train_calls = model.train_calls
    adversarial = case(threat)(model, inputs, labels)
    snapshot.check()
    assert model.forwards > 0
    assert not any(model.seen_modes.values()), "the model was attacked in training mode"
    assert model.train_calls == train_calls, "train() belongs to the user"
    assert torch.equal(inputs, kept), "the model worked in place on the user's inputs"
    assert_legal(case, threat, adversarial, inputs)


@every_attack
@pytest.mark.parametrize("call", [1, 2, 4])
def test_leaves_a_failing_module_as_it_was(case, call):
    inputs, labels = torch.rand(8, 1, 6, 6), torch.arange(8) % 5
    healthy, model = Nasty(36), Nasty(36, fail_at=call)
    case(LINF)(healthy, inputs, labels)
    fails = healthy.forwards >= call
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match="nasty failure") if fails else nullcontext():
        case(LINF)(model, inputs, labels)
    snapshot.check()


@every_attack
def test_leaves_a_method_or_partial_of_a_module_as_it_was(case):
    inputs, labels = torch.rand(8, *case.shape(36)), torch.arange(8) % 5
    for wrap in (lambda model: model.forward, lambda model: partial(model.forward), lambda model: partial(model)):
        model = Nasty(36)
        snapshot = Snapshot(model)
        case(LINF)(wrap(model), inputs, labels)
        snapshot.check()


@every_attack
def test_does_not_disturb_a_graph_under_way(case):
    """A user's forward pass whose backward comes after the attack."""
    model = classifier(*case.shape(6)).train()
    inputs, labels = batch(*case.shape(6))
    model(inputs).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = model(inputs).sum()
    case(LINF)(model, inputs, labels)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# --- whatever mode it is called in


@every_attack
@norms
def test_same_result_without_gradients(case, threat):
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    plain = case(threat)(model, inputs, labels)
    with torch.no_grad():
        snapshot = Snapshot(model)
        assert torch.equal(case(threat)(model, inputs, labels), plain)
        snapshot.check()
    with torch.inference_mode():
        snapshot = Snapshot(model)
        result = case(threat)(model, inputs.clone(), labels.clone())
        snapshot.check()
    assert torch.equal(result, plain)
    assert not result.is_inference(), "the result must be usable for training"


@every_attack
def test_buffers_and_autocast_weights_made_in_inference_mode(case):
    """Validation leaves inference tensors behind, in buffers and in autocast's cache; graphs must not meet them."""
    model = classifier(*case.shape(6))
    inputs, labels = batch(*case.shape(6))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model[2].running_mean = model[2].running_mean + 0.1
        model(inputs)
        snapshot = Snapshot(model)
        adversarial = case(LINF)(model, inputs.clone(), labels.clone())
        snapshot.check()
    assert_legal(case, LINF, adversarial, inputs)


@every_attack
@norms
@pytest.mark.parametrize("before", ["nothing", "no_grad forward", "training forward"])
def test_inside_autocast(case, threat, before):
    """Bounds hold, and training in the same region gets its parameter gradients: the weight cache is not poisoned."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        if before == "no_grad forward":
            with torch.no_grad():
                model(inputs)
            torch.clear_autocast_cache()
        elif before == "training forward":
            earlier = model(inputs).float().sum()
        adversarial = case(threat)(model, inputs, labels)
        assert adversarial.dtype == inputs.dtype
        loss = torch.nn.functional.cross_entropy(model(adversarial), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        if before == "training forward":
            earlier.backward()
    assert_legal(case, threat, adversarial, inputs)


@own_attacks
@pytest.mark.parametrize("half", ["autocast", "model"])
def test_float16_gradients_do_not_underflow(case, half):
    """A confident model's gradients, near 1e-8, are nothing in float16."""
    if case.transports:
        pytest.skip("moves mass between pixels: test_wasserstein.py looks at whether it does")
    if not case.scaled:
        pytest.skip("gradients of 1e-8 do not move it: test_training_attacks.py looks at what they do")
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    inputs = torch.rand(8, 6)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([19.0, 0.0, 0.0]))
    labels = torch.zeros(8, dtype=torch.long)
    attack = case(ThreatModel(eps=0.05))
    expected = attack(model, inputs, labels) - inputs
    if half == "model":
        adversarial = attack(model.half(), inputs.half(), labels)
    else:
        with torch.autocast("cpu", torch.float16):
            adversarial = attack(model, inputs, labels)
    moved = adversarial.float() - inputs
    assert (moved.abs() > 1e-4).float().mean() > 0.9
    if case.noisy is False:
        assert ((moved > 0) == (expected > 0)).float().mean() > 0.9


# --- the bounds and the ball

STATISTICS = {
    "none": (None, None),
    "scalar": (0.4, 0.3),
    "channels": ((0.2, 0.5, 0.6), (0.2, 0.3, 0.25)),
    "mean only": ((0.2, 0.5, 0.6), None),
}


@every_attack
@norms
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)], ids=str)
@pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)
def test_never_leaves_bounds_or_ball(case, threat, bounds, statistics):
    if case.transports and bounds[0] != 0:
        pytest.skip("a pixel without mass is 0")
    low, span = bounds[0], bounds[1] - bounds[0]
    mean, std = (
        None if s is None else tuple(span * v + low * shift for v in np.atleast_1d(s))
        for s, shift in zip(statistics, (1, 0), strict=True)
    )
    eps = threat.eps if case.transports else threat.eps * span
    threat = ThreatModel(norm=threat.norm, eps=eps, bounds=bounds, mean=mean, std=std)
    unit, labels = batch(3, 4, 4, n=4)
    unit[0, :, :2], unit[1, :, :2] = 0.0, 1.0  # corners of the box
    inputs = threat.to_model(unit * span + low)
    model = torch.nn.Sequential(ToUnit(threat), classifier(3, 4, 4))
    adversarial = case(threat)(model, inputs, labels)
    assert_legal(case, threat, adversarial, inputs, tol=2e-6)


class ToUnit(torch.nn.Module):
    """What the user's normalisation was undone to, so that one classifier serves all units."""

    def __init__(self, threat: ThreatModel) -> None:
        super().__init__()
        self.threat = threat

    def forward(self, inputs):
        low, high = self.threat.bounds
        return (self.threat.to_data(inputs) - low) / (high - low)


@every_attack
@norms
def test_normalisation_changes_nothing(case, threat):
    """The same attack in data units, whatever units the model sees."""
    plain, labels = batch(3, 4, 4)
    model = classifier(3, 4, 4)
    threat_norm = ThreatModel(norm=threat.norm, eps=threat.eps, mean=(0.2, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    normalised = torch.nn.Sequential(ToUnit(threat_norm), model)
    expected = case(threat)(model, plain, labels)
    got = threat_norm.to_data(case(threat_norm)(normalised, threat_norm.to_model(plain), labels))
    close = (got - expected).abs().flatten(1).amax(1) < 1e-3  # rounding may flip single signs on the way
    assert close.float().mean() >= 0.75


@own_attacks
@norms
def test_unbounded_inputs(case, threat):
    if case.transports:
        pytest.skip("mass is not negative")
    threat = ThreatModel(norm=threat.norm, eps=threat.eps, bounds=None)
    model = classifier(6)
    inputs = 10 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    labels = model(inputs).argmax(1)
    assert_legal(case, threat, case(threat)(model, inputs, labels), inputs, tol=4e-6)


@own_attacks
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    eps=st.floats(1e-4, 3.0),
    norm=st.sampled_from(["linf", "l2"]),
    bounds=st.sampled_from([(0.0, 1.0), (-3.0, 5.0), None]),
    seed=st.integers(0, 100),
)
def test_any_shape_and_radius(case, shape, eps, norm, bounds, seed):
    if not case.takes(tuple(shape)) or (case.transports and bounds == (-3.0, 5.0)):
        return
    threat = ThreatModel(norm=norm, eps=eps, bounds=bounds)
    inputs = torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed))
    model = classifier(*(shape or [1]), seed=seed)
    flat = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), model) if not shape else model
    adversarial = case(threat)(flat, inputs, torch.tensor([0, 1, 2]))
    assert adversarial.shape == inputs.shape
    assert_legal(case, threat, adversarial, inputs)


# --- shapes, dtypes, aliasing

SHAPES = [(), (1,), (7,), (30,), (4, 3), (3, 8, 8), (3, 5, 9), (1, 9, 2), (1, 4, 4), (1, 1, 1), (2, 3, 3, 3)]


@every_attack
@norms
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_of_any_shape(case, threat, shape):
    if not case.takes(shape):
        pytest.skip("no image, or smaller than the neighbourhood")
    model = classifier(*shape or (1,))
    if not shape:
        model = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), model)
    inputs, labels = batch(*shape, model=model)
    kept = inputs.clone()
    adversarial = case(threat)(model, inputs, labels)
    assert adversarial.shape == inputs.shape
    assert adversarial.device == inputs.device
    assert not adversarial.requires_grad
    assert adversarial.untyped_storage().data_ptr() != inputs.untyped_storage().data_ptr()
    assert torch.equal(inputs, kept)
    assert_legal(case, threat, adversarial, inputs)


@every_attack
@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, threat, dtype):
    model = classifier(1, 6, 6).to(dtype)
    inputs, labels = batch(1, 6, 6)
    inputs = inputs.to(dtype)
    adversarial = case(threat)(model, inputs, labels)
    assert adversarial.dtype == dtype
    rounding = torch.finfo(dtype).eps * (1 if threat.norm == "linf" else 6)
    assert_legal(case, threat, adversarial, inputs, tol=max(1e-6, rounding))
    if not case(threat).bounded or case.own:
        assert (adversarial - inputs).abs().amax() > 0.05


@every_attack
@norms
def test_channels_last_and_expanded_inputs(case, threat):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), classifier(4, 6, 6))
    model = model.to(memory_format=torch.channels_last)
    inputs, labels = batch(3, 8, 8, model=model)
    expected = case(threat)(model, inputs, labels)
    got = case(threat)(model, inputs.to(memory_format=torch.channels_last), labels)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    wide = inputs[:1].expand(4, 3, 8, 8)
    assert_legal(case, threat, case(threat)(model, wide, labels[:1].expand(4)), wide)


@every_attack
def test_inputs_that_require_grad(case):
    model = classifier(*case.shape(6))
    inputs, labels = batch(*case.shape(6))
    inputs = inputs.requires_grad_()
    adversarial = case(LINF)(model, inputs, labels)
    assert not adversarial.requires_grad
    assert inputs.grad is None


@every_attack
def test_one_sample(case):
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=1)
    assert case(LINF)(model, inputs, labels).shape == (1, 1, 6, 6)


@every_attack
@norms
def test_a_model_without_gradient(case, threat):
    """Saturated everywhere: nothing to gain, and nothing that is not finite."""

    def model(inputs):
        return 0 * inputs.flatten(1)[:, :5] + torch.tensor([3.0, 1.0, 0.0, -1.0, 2.0])

    inputs, _ = batch(1, 6, 6)
    for label in (0, 1):
        adversarial = case(threat)(model, inputs, torch.full((8,), label))
        assert_legal(case, threat, adversarial, inputs)


# --- determinism and configuration


@every_attack
@norms
def test_deterministic(case, threat):
    model = Nasty(36)
    inputs, labels = torch.rand(8, 1, 6, 6), torch.arange(8) % 5
    attack = case(threat)
    assert torch.equal(attack(model, inputs, labels), attack(model, inputs, labels))
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    expected = attack(model, inputs, labels)
    torch.manual_seed(12345), random.seed(12345), np.random.seed(12345)
    assert torch.equal(attack(model, inputs, labels), expected), "the global random state must not matter"
    seeded = [attack(model, inputs, labels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert case.noisy != torch.equal(seeded[0], seeded[2])
    object.__setattr__(other := copy.copy(attack), "seed", 1)
    assert torch.equal(other(model, inputs, labels), seeded[0])


@every_attack
def test_a_shared_generator_moves_on(case):
    """Consecutive batches of one generator get fresh noise."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    generator = torch.Generator().manual_seed(0)
    first, second = (case(LINF)(model, inputs, labels, generator=generator) for _ in range(2))
    assert case.noisy != torch.equal(first, second)


@every_attack
def test_is_plain_configuration(case):
    attack = case(LINF)
    model = classifier(*case.shape(6))
    inputs, labels = batch(*case.shape(6))
    expected = attack(model, inputs, labels)
    for twin in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack), case(LINF)):
        assert twin == attack
        assert hash(twin) == hash(attack)
        assert torch.equal(twin(model, inputs, labels), expected)
    assert pickle.dumps(attack) == pickle.dumps(case(LINF)), "a call must leave nothing in the attack"
    assert type(attack).__name__ in repr(attack)
    assert repr(case.threat(LINF)) in repr(attack)
    assert "seed=0" in repr(attack)
    assert attack.name
    assert attack.seed == 0


@every_attack
@norms
def test_with_eps(case, threat):
    attack = case(threat).with_eps(0.05)
    assert type(attack) is type(case(threat))
    assert attack.threat == case.threat(threat).with_eps(0.05)
    assert attack.name == case(threat).name
    assert attack == case(threat.with_eps(0.05))
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    assert_legal(case, attack.threat, attack(model, inputs, labels), inputs)


@every_attack
@norms
def test_no_radius_no_change(case, threat):
    threat = ThreatModel(norm=threat.norm, eps=0.0, mean=0.3, std=0.7)
    model = classifier(*case.shape(6))
    inputs = threat.to_model(batch(*case.shape(6))[0])
    adversarial = case(threat)(model, inputs, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(adversarial, inputs, atol=0 if case(threat).bounded else 1e-6, rtol=0)
    assert adversarial.data_ptr() != inputs.data_ptr()


@every_attack
def test_labels_are_left_alone(case):
    model = classifier(*case.shape(6))
    inputs, labels = batch(*case.shape(6))
    kept = labels.clone()
    case(LINF)(model, inputs, labels)
    assert torch.equal(labels, kept)


@every_attack
def test_does_harm(case):
    """The point of it all, with a few steps on a model that is right everywhere."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=40)
    adversarial = case(ThreatModel(eps=0.2))(model, inputs, labels)
    assert (model(adversarial).argmax(1) == labels).float().mean() < 0.9


def test_structured_labels_follow_their_samples():
    """A callable loss may take labels of any structure; restarts attack some of the samples only."""
    model = classifier(6)
    inputs, labels = batch(6)

    def loss(outputs, targets):
        seen.append(len(targets["class"]))
        return torch.nn.functional.cross_entropy(outputs, targets["class"], reduction="none")

    seen: list[int] = []
    only = torch.arange(len(inputs)) % 2 == 0
    attack = PGD(ThreatModel(eps=0.1), steps=2, restarts=2, loss=loss)
    adversarial = attack(model, inputs, {"class": labels}, samples=only)
    assert set(seen) == {int(only.sum())}
    assert torch.equal(adversarial[~only], inputs[~only])
