"""What every attack promises, tested for each line of the table."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attacks import ATTACK_CASES, EPS_CASES, OWN_CASES, AttackCase
from support.modules import Nasty, Snapshot, batch, classifier

from lightning_wdefense.attacks import PGD, ThreatModel, WassersteinAttack, wasserstein_feasibility

every_attack = pytest.mark.parametrize("case", ATTACK_CASES.values(), ids=ATTACK_CASES)
attacks_by_eps = pytest.mark.parametrize("case", EPS_CASES.values(), ids=EPS_CASES)
own_attacks = pytest.mark.parametrize("case", OWN_CASES.values(), ids=OWN_CASES)
LINF = ThreatModel(norm="linf", eps=0.2)
L2 = ThreatModel(norm="l2", eps=0.8)
L1 = ThreatModel(norm="l1", eps=3.0)
norms = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def attacks_with(names: str, rows: dict[str, tuple], fits: Callable[..., bool] = lambda case, *row: True):
    """Every attack with every row that fits it. Rows cover values and pairs that interact: all combinations would see no more."""
    cases = [
        pytest.param(case, *row, id=f"{label}-{name}")
        for label, row in rows.items()
        for name, case in ATTACK_CASES.items()
        if fits(case, *row)
    ]
    return pytest.mark.parametrize(f"case, {names}", cases)


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
    inputs, labels = torch.rand(4, 1, 6, 6), torch.arange(4)
    kept, snapshot = inputs.clone(), Snapshot(model)
    train_calls = model.train_calls
    adversarial = case(threat)(model, inputs, labels)
    snapshot.check()
    assert torch.equal(case(threat)(model, inputs, labels), adversarial), (
        "the model's own noise is the same at every call"
    )
    assert model.forwards > 0
    assert not any(model.seen_modes.values()), "the model was attacked in training mode"
    assert model.train_calls == train_calls, "train() belongs to the user"
    assert torch.equal(inputs, kept), "the model worked in place on the user's inputs"
    assert_legal(case, threat, adversarial, inputs)


@every_attack
def test_leaves_a_failing_module_as_it_was(case):
    inputs, labels = torch.rand(4, 1, 6, 6), torch.arange(4)
    case(LINF)(healthy := Nasty(36), inputs, labels)
    for call in {1, 2, 4} & {*range(1, healthy.forwards + 1)}:
        model = Nasty(36, fail_at=call)
        snapshot = Snapshot(model)
        with pytest.raises(RuntimeError, match="nasty failure"):
            case(LINF)(model, inputs, labels)
        snapshot.check()


@every_attack
def test_leaves_a_method_or_partial_of_a_module_as_it_was(case):
    inputs, labels = torch.rand(4, *case.shape(36)), torch.arange(4)
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


@attacks_with(
    "threat, before",
    {
        "linf-nothing": (LINF, "nothing"),
        "l2-no_grad forward": (L2, "no_grad forward"),
        "linf-training forward": (LINF, "training forward"),
    },
)
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


# Those that move mass between pixels, and those that gradients of 1e-8 do not move, have tests of their own files.
SCALED_CASES = {name: case for name, case in OWN_CASES.items() if case.scaled and not case.transports}


@pytest.mark.parametrize("case", SCALED_CASES.values(), ids=SCALED_CASES)
@pytest.mark.parametrize("half", ["autocast", "model"])
def test_float16_gradients_do_not_underflow(case, half):
    """A confident model's gradients, near 1e-8, are nothing in float16."""
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


UNITS = {
    f"{statistics}-{bounds}-{threat.norm}": (threat, bounds, STATISTICS[statistics])
    for threat, bounds, statistics in [
        (LINF, (0.0, 1.0), "none"),
        (L2, (0.0, 1.0), "mean only"),
        (LINF, (-1.0, 1.0), "none"),
        (L2, (-1.0, 1.0), "channels"),
        (LINF, (0.0, 255.0), "channels"),
        (L2, (0.0, 255.0), "scalar"),
        (L1, (0.0, 1.0), "channels"),
        (L1, (-1.0, 1.0), "scalar"),
    ]
}


@attacks_with(
    "threat, bounds, statistics",
    UNITS,
    # A pixel without mass is 0.
    lambda case, threat, bounds, statistics: case.knows(threat.norm) and (not case.transports or bounds[0] == 0),
)
def test_never_leaves_bounds_or_ball(case, threat, bounds, statistics):
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


@attacks_with(
    "threat",
    {"linf": (LINF,), "l2": (L2,), "l1": (L1,)},
    lambda case, threat: case.own and not case.transports and case.knows(threat.norm),
)  # mass is not negative
def test_unbounded_inputs(case, threat):
    threat = ThreatModel(norm=threat.norm, eps=threat.eps, bounds=None)
    model = classifier(6)
    inputs = 10 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    labels = model(inputs).argmax(1)
    assert_legal(case, threat, case(threat)(model, inputs, labels), inputs, tol=4e-6)


@own_attacks
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    eps=st.floats(1e-4, 3.0),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    bounds=st.sampled_from([(0.0, 1.0), (-3.0, 5.0), None]),
    seed=st.integers(0, 100),
)
def test_any_shape_and_radius(case, shape, eps, norm, bounds, seed):
    if not case.takes(tuple(shape)) or not case.knows(norm) or (case.transports and bounds == (-3.0, 5.0)):
        return
    threat = ThreatModel(norm=norm, eps=eps, bounds=bounds)
    inputs = torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed))
    model = classifier(*(shape or [1]), seed=seed)
    flat = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), model) if not shape else model
    adversarial = case(threat)(flat, inputs, torch.tensor([0, 1, 2]))
    assert adversarial.shape == inputs.shape
    assert_legal(case, threat, adversarial, inputs)


# --- shapes, dtypes, aliasing

# Of a batch. Our own attacks do the same in each norm with any shape; those of others have code of their own for both.
FOREIGN = [case for case in ATTACK_CASES.values() if not case.own]
SHAPES = {
    (4,): L2,
    (4, 1): LINF,
    (4, 7): L2,
    (4, 30): LINF,
    (4, 4, 3): L2,
    (4, 3, 8, 8): LINF,
    (4, 3, 5, 9): L2,
    (4, 1, 9, 2): LINF,
    (4, 1, 4, 4): LINF,
    (4, 1, 1, 1): L2,
    (4, 2, 3, 3, 3): L2,
    (1, 1, 6, 6): LINF,
}


@attacks_with(
    "threat, shape",
    {f"{shape}-{threat.norm}": (threat, shape) for shape in SHAPES for threat in (LINF, L2)},
    lambda case, threat, shape: case.takes(shape[1:], shape[0]) and (SHAPES[shape] is threat or case in FOREIGN),
)
def test_inputs_of_any_shape(case, threat, shape):
    """Neither they nor the labels are written to, shared, or made part of a graph."""
    n, *features = shape
    model = classifier(*features or (1,))
    if not features:
        model = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 1)), model)
    inputs, labels = batch(*features, model=model, n=n)
    kept, kept_labels = inputs.clone(), labels.clone()
    adversarial = case(threat)(model, inputs.requires_grad_(), labels)
    assert adversarial.shape == inputs.shape
    assert adversarial.device == inputs.device
    assert not adversarial.requires_grad
    assert inputs.grad is None
    assert adversarial.untyped_storage().data_ptr() != inputs.untyped_storage().data_ptr()
    assert torch.equal(inputs, kept)
    assert torch.equal(labels, kept_labels)
    assert_legal(case, threat, adversarial, inputs.detach())


@attacks_with(
    "threat, dtype",
    {
        "float64-l2": (L2, torch.float64),
        "bfloat16-linf": (LINF, torch.bfloat16),
        "float16-l2": (L2, torch.float16),
    },
)
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
def test_channels_last_and_expanded_inputs(case):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), classifier(4, 6, 6))
    model = model.to(memory_format=torch.channels_last)
    inputs, labels = batch(3, 8, 8, model=model, n=4)
    expected = case(L2)(model, inputs, labels)  # whose lengths are of all channels
    got = case(L2)(model, inputs.to(memory_format=torch.channels_last), labels)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    wide = inputs[:1].expand(4, 3, 8, 8)
    assert_legal(case, LINF, case(LINF)(model, wide, labels[:1].expand(4)), wide)


@every_attack
@norms
def test_a_model_without_gradient(case, threat):
    """Saturated everywhere: nothing to gain, and nothing that is not finite."""

    def model(inputs):
        return 0 * inputs.flatten(1)[:, :5] + torch.tensor([3.0, 1.0, 0.0, -1.0, 2.0])

    inputs, _ = batch(1, 6, 6, n=4)
    adversarial = case(threat)(model, inputs, torch.tensor([0, 1, 0, 1]))  # right and wrong
    assert_legal(case, threat, adversarial, inputs)


# --- determinism and configuration


@attacks_by_eps
@norms
def test_deterministic(case, threat):
    """Its configuration and its seed or generator say what comes out, and nothing else does."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6)
    attack = case(threat)
    expected = attack(model, inputs, labels)
    twin = copy.deepcopy(pickle.loads(pickle.dumps(attack)))
    torch.manual_seed(12345), random.seed(12345), np.random.seed(12345)
    assert torch.equal(twin(model, inputs, labels), expected), "the global random state must not matter"
    generator = torch.Generator().manual_seed(1)
    first, second = (attack(model, inputs, labels, generator=generator) for _ in range(2))
    assert case.noisy != torch.equal(first, expected), "another seed, another result"
    assert case.noisy != torch.equal(first, second), "consecutive batches of one generator get fresh noise"
    object.__setattr__(other := copy.copy(attack), "seed", 1)
    assert torch.equal(other(model, inputs, labels), first)


@attacks_by_eps
@norms
def test_is_plain_configuration(case, threat):
    attack = case(threat)
    for twin in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack), case(threat)):
        assert twin == attack
        assert hash(twin) == hash(attack)
    assert type(attack).__name__ in repr(attack)
    assert repr(case.threat(threat)) in repr(attack)
    assert "seed=0" in repr(attack)
    assert attack.name
    assert attack.seed == 0
    smaller = attack.with_eps(0.05)
    assert type(smaller) is type(attack)
    assert smaller.threat == case.threat(threat).with_eps(0.05)
    assert smaller.name == attack.name
    assert smaller == case(threat.with_eps(0.05))
    before = pickle.dumps(smaller)
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, n=4)
    assert_legal(case, smaller.threat, smaller(model, inputs, labels), inputs)
    assert pickle.dumps(smaller) == before, "a call must leave nothing in the attack"


@attacks_by_eps
@norms
def test_no_radius_no_change(case, threat):
    threat = ThreatModel(norm=threat.norm, eps=0.0, mean=0.3, std=0.7)
    model = classifier(*case.shape(6))
    inputs = threat.to_model(batch(*case.shape(6), n=4)[0])
    adversarial = case(threat)(model, inputs, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(adversarial, inputs, atol=0 if case(threat).bounded else 1e-6, rtol=0)
    assert adversarial.data_ptr() != inputs.data_ptr()


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
