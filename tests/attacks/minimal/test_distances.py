"""Distances to the decision boundary, against closed forms, exhaustive search and each other."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from support.attacks import square_error
from support.modules import batch, classifier

from lightning_wdefense.attacks import (
    DDN,
    FMN,
    PGD,
    MinimalEps,
    ThreatModel,
    WassersteinAttack,
    get_attack,
    get_minimal_attack,
)
from lightning_wdefense.attacks.norms import BALLS, l1_project

# A new minimum-norm attack joins by a line.
SEARCHES = {
    "fmn": FMN,
    "fmn-targets": lambda threat: FMN(threat, targets=2),
    "ddn": DDN,
    "minimal-pgd": lambda threat: MinimalEps(PGD(threat, steps=20)),
    "minimal-pgd-margin": lambda threat: MinimalEps(PGD(threat, steps=20, loss="margin", random_start=False)),
}
CASES = [(name, norm) for name in SEARCHES for norm in BALLS if name != "ddn" or norm == "l2"]
every_search = pytest.mark.parametrize(("name", "norm"), CASES, ids=[f"{name}-{norm}" for name, norm in CASES])


def linear(features: int, classes: int = 2, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(features, classes).double()


def to_boundary(model: torch.nn.Linear, inputs: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    """The distance to the nearest hyperplane at which another class wins."""
    weight, bias = model.weight.detach(), model.bias.detach()
    slopes, levels = weight[labels].unsqueeze(1) - weight, bias[labels].unsqueeze(1) - bias
    margins = (slopes * inputs.unsqueeze(1)).sum(2) + levels
    dual = torch.stack([BALLS[norm].dual(rows) for rows in slopes])
    return (margins / dual).nan_to_num(nan=torch.inf).amin(1)


@every_search
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_linear_model(name, norm, classes, scale):
    model = linear(20, classes)
    inputs = scale * torch.randn(12, 20, generator=torch.Generator().manual_seed(1)).double()
    labels = model(inputs).argmax(1)
    labels[0] = (labels[0] + 1) % classes
    if scale > 1 and name == "minimal-pgd":
        pytest.skip("the cross-entropy saturates, and PGD with it")
    threat = ThreatModel(norm=norm, eps=scale, bounds=None)
    found = SEARCHES[name](threat)(model, inputs, labels)
    expected = to_boundary(model, inputs, labels, norm)
    assert found.distances[0] == 0
    assert torch.equal(found.inputs[0], inputs[0])
    error = found.distances[1:] / expected[1:] - 1
    assert error.min() > -1e-6
    # With several classes an attack may go for another than the nearest, above all by the cross-entropy.
    assert error.quantile(1.0 if classes == 2 else 0.5) < (1e-3 if classes == 2 or name != "ddn" else 0.2)
    torch.testing.assert_close(BALLS[norm].length(found.inputs - inputs), found.distances, rtol=1e-6, atol=1e-9)
    assert (model(found.inputs).argmax(1) != labels).all()


@pytest.mark.parametrize("norm", BALLS)
def test_linear_model_in_a_box(norm):
    """Against the closed form: coordinates move, in the order of their worth, as far as the box lets them."""
    model = linear(6)
    inputs = torch.rand(20, 6, generator=torch.Generator().manual_seed(2)).double()
    labels = model(inputs).argmax(1)
    threat = ThreatModel(norm=norm, eps=0.1)
    found = FMN(threat, steps=300)(model, inputs, labels)
    slope = (model.weight[1] - model.weight[0]).detach()
    for sample, label, distance in zip(inputs, labels, found.distances, strict=True):
        # Towards the other class. The best perturbation of size t is monotone in t, so bisection finds the smallest that suffices.
        way = slope if label == 0 else -slope
        room = torch.where(way > 0, 1 - sample, sample)
        needed = float((model(sample)[label] - model(sample)[1 - label]).detach())
        if (way.abs() * room).sum() <= needed:
            assert distance == torch.inf
            continue
        expected = _least(way.abs(), room, needed, norm)
        assert expected * (1 - 1e-6) <= distance <= expected * (1 + 2e-3)


def _least(worth: torch.Tensor, room: torch.Tensor, needed: float, norm: str) -> float:
    """The smallest norm of a move in the room that is worth as much as needed."""
    if norm == "l1":
        order, total = worth.argsort(descending=True), 0.0
        for index in order:
            if worth[index] * room[index] >= needed:
                return total + needed / float(worth[index])
            needed, total = needed - float(worth[index] * room[index]), total + float(room[index])
        raise AssertionError("not enough room")
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        move = torch.minimum(middle * (torch.ones_like(worth) if norm == "linf" else worth), room)
        low, high = (low, middle) if (worth * move).sum() >= needed else (middle, high)
    return float(BALLS[norm].length(move.unsqueeze(0)))


@every_search
def test_network(name, norm):
    """What is found fools the model, lies in the bounds, and PGD finds nothing much closer."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, model=model, n=12)
    threat = ThreatModel(norm=norm, eps=0.1, mean=0.5, std=0.25)
    model = torch.nn.Sequential(model)
    given = threat.to_model(inputs)
    labels = model(given).argmax(1)
    found = SEARCHES[name](threat)(model, given, labels)
    reached = found.distances.isfinite()
    assert reached.float().mean() > 0.8
    assert (model(found.inputs).argmax(1) != labels)[reached].all()
    data = threat.to_data(found.inputs)
    assert data.min() >= -1e-6
    assert data.max() <= 1 + 1e-6
    torch.testing.assert_close(
        threat.ball.length(data - inputs)[reached], found.distances[reached], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(found.inputs[~reached], given[~reached])
    for share, most in ((0.8, 0.2), (1.2, 1.0)):
        eps = float(found.distances[reached].median()) * share
        fell = model(PGD(threat.with_eps(eps), steps=40)(model, given, labels)).argmax(1) != labels
        assert (fell & (found.distances > eps * 1.02)).float().mean() <= most


def test_the_wasserstein_norm():
    """The smallest eps at which the attack succeeds: it fails just below."""
    model = classifier(1, 6, 6)
    inputs, labels = batch(1, 6, 6, model=model, n=4)
    labels = model(inputs).argmax(1)
    threat = ThreatModel(norm="wasserstein", eps=0.1)
    attack = WassersteinAttack(threat, steps=8, restarts=1, methods=("frank-wolfe",), neighbourhood=3)
    found = MinimalEps(attack, tolerance=0.2)(model, inputs, labels)
    assert found.distances.isfinite().any()
    for index in found.distances.isfinite().nonzero().flatten():
        one = slice(int(index), int(index) + 1)
        for factor, falls in ((1.0001, True), (1 / 1.21, False)):
            again = attack.with_eps(float(found.distances[index]) * factor)(model, inputs[one], labels[one])
            assert bool(model(again).argmax(1) != labels[one]) == falls


def test_no_sample_is_asked_more_than_bisection_needs():
    asked: list[int] = []

    class Counted(torch.nn.Module):
        def forward(self, inputs):
            asked.append(len(inputs))
            return torch.stack([3 * inputs[:, 0], 3 - 3 * inputs[:, 0]], 1)

    inputs = torch.linspace(0.6, 0.95, 8).unsqueeze(1)
    labels = torch.zeros(8, dtype=torch.long)
    attack = PGD(ThreatModel(eps=0.1), steps=1, random_start=False)
    found = MinimalEps(attack, tolerance=0.01, tightening=0)(Counted(), inputs, labels)
    torch.testing.assert_close(found.distances, inputs.flatten() - 0.5, rtol=0.011, atol=0)
    # At most a doubling or two to bracket, and log2(log(2) / log(1.01)) = 6.1 halvings, each a step and a check.
    assert sum(asked) <= 8 * (1 + 2 * 11)


def test_the_closest_of_all_steps_is_kept():
    """Radii of 1.5, 0.75, 1.125, 0.5625, 0.84 and 1.27 times the distance: the third is the closest that suffices."""
    attack = DDN(ThreatModel(norm="l2", bounds=None), steps=7, shrinkage=0.5, tightening=0)
    found = attack(lambda x: torch.cat([x, -x], 1), torch.tensor([[2.0]]), torch.tensor([0]))
    torch.testing.assert_close(found.distances, torch.tensor([2.25]))
    torch.testing.assert_close(found.inputs, torch.tensor([[-0.25]]))


def test_targets_find_a_nearer_class():
    """Untargeted, the margin climbs towards the class with the best logit, which here is not the nearest."""

    def model(x):
        return torch.stack([4.0 + 0 * x[:, 0], 3.0 + 0.1 * x[:, 0], 2.0 - 2 * x[:, 0]], 1)

    threat, inputs, labels = ThreatModel(norm="l2", bounds=None), torch.zeros(1, 1), torch.tensor([0])
    untargeted = FMN(threat)(model, inputs, labels).distances
    targeted = FMN(threat, targets=2)(model, inputs, labels).distances
    torch.testing.assert_close(untargeted, torch.tensor([10.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close(targeted, torch.tensor([1.0]), rtol=1e-3, atol=0)


def test_of_a_sample_that_cannot_fall():
    for attack in (FMN(ThreatModel()), DDN(ThreatModel(norm="l2")), MinimalEps(PGD(ThreatModel()))):
        found = attack(
            lambda x: x @ torch.tensor([[0.0, 0.1]]) - torch.tensor([0.0, 5.0]), torch.rand(3, 1), torch.zeros(3).long()
        )
        assert found.distances.isinf().all()
        assert found.inputs.shape == (3, 1)


def test_single_logit_and_soft_labels():
    inputs = torch.tensor([[2.0], [0.5], [-1.0]])
    threat = ThreatModel(norm="l2", bounds=None)
    binary = FMN(threat)(lambda x: x, inputs, torch.tensor([1, 1, 1])).distances
    torch.testing.assert_close(binary, torch.tensor([2.0, 0.5, 0.0]), rtol=1e-3, atol=0)
    soft = torch.tensor([[0.1, 0.9]] * 3)
    assert torch.equal(FMN(threat)(lambda x: torch.cat([0 * x, x], 1), inputs, soft).distances, binary)


@every_search
def test_is_plain_configuration(name, norm):
    attack = SEARCHES[name](ThreatModel(norm=norm, eps=0.1))
    for twin in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack), eval(repr(attack))):
        assert twin == attack
        assert hash(twin) == hash(attack)
    other = attack.with_threat(ThreatModel(norm=norm, eps=0.1, mean=0.5))
    assert other.threat == ThreatModel(norm=norm, eps=0.1, mean=0.5)


def test_by_name():
    threat = ThreatModel(norm="l2", eps=0.5)
    assert get_minimal_attack("fmn", threat, steps=7) == FMN(threat, steps=7)
    assert get_minimal_attack("minimal-pgd", threat) == MinimalEps(PGD(threat))
    assert get_minimal_attack("minimal-wasserstein", replace(threat, norm="wasserstein")).name == "minimal-wasserstein"


L2 = ThreatModel(norm="l2", eps=0.5)
MASKS = torch.zeros(2, 4, 4, dtype=torch.long)
ERRORS = {
    "unknown norm": (lambda: FMN(ThreatModel(norm="wasserstein")), ValueError, "no norm 'wasserstein'.*MinimalEps"),
    "ddn in linf": (lambda: DDN(ThreatModel()), ValueError, "no norm 'linf'"),
    "no threat": (lambda: FMN(0.1), TypeError, "ThreatModel"),
    "steps": (lambda: FMN(L2, steps=0), ValueError, "steps must be at least 1, got 0"),
    "step size": (lambda: DDN(L2, step_size=0.0), ValueError, "step_size must be positive"),
    "shrinkage": (lambda: FMN(L2, shrinkage=1.0), ValueError, "shrinkage must be between 0 and 1, got 1.0"),
    "ddn shrinkage": (lambda: DDN(L2, shrinkage=0.0), ValueError, "shrinkage must be between 0 and 1, got 0.0"),
    "targets": (lambda: FMN(L2, targets=-1), ValueError, "targets must not be negative, got -1"),
    "tightening": (lambda: FMN(L2, tightening=-1), ValueError, "tightening must not be negative, got -1"),
    "no attack": (lambda: MinimalEps("pgd"), TypeError, "needs an attack, such as PGD.*'pgd'"),
    "unbounded attack": (lambda: MinimalEps(get_attack("n-fgsm", L2)), ValueError, "leaves the threat model's ball"),
    "eps 0": (lambda: MinimalEps(PGD(L2.with_eps(0))), ValueError, "must be positive, got 0.0"),
    "max_eps": (lambda: MinimalEps(PGD(L2), max_eps=0), ValueError, "max_eps must be positive"),
    "tolerance": (lambda: MinimalEps(PGD(L2), tolerance=0), ValueError, "tolerance must be between 0 and 1"),
    "min_ratio": (lambda: MinimalEps(PGD(L2), min_ratio=1), ValueError, "min_ratio must be between 0 and 1"),
    "name": (lambda: get_minimal_attack("fnm", L2), ValueError, "no minimum-norm attack 'fnm'. Did you mean 'fmn'"),
    "as an attack": (lambda: get_attack("fmn", L2), ValueError, "distances='fmn'"),
    "masks": (
        lambda: FMN(L2)(lambda x: x, torch.rand(2, 3, 4, 4), MASKS), ValueError, r"one label for each sample.*\(2, 4, 4\)",
    ),
    "probabilities": (
        lambda: FMN(L2)(lambda x: x.softmax(1), torch.rand(9, 3), torch.zeros(9).long()), ValueError, "probabilities",
    ),
    "regression": (
        lambda: FMN(L2)(lambda x: x, torch.rand(2, 3), torch.rand(2)), ValueError, "Soft labels must have the shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("seed", range(4))
def test_projection_onto_the_l1_ball_and_the_box(seed):
    """Against a fine search for the multiplier, and against the definition of a projection."""
    generator = torch.Generator().manual_seed(seed)
    delta = 2 * torch.randn(5, 3, 4, generator=generator).double()
    low, high = (sign * torch.rand(5, 3, 4, generator=generator).double() for sign in (-1, 1))
    eps = torch.tensor([0.0, 0.1, 1.0, 3.0, 100.0]).double()
    found = l1_project(delta, eps, low, high)
    assert (found >= low).all()
    assert (found <= high).all()
    assert (BALLS["l1"].length(found) <= eps + 1e-9).all()
    # No other point of the set is nearer: the set is convex, so the angle to every other point of it is obtuse.
    others = torch.minimum(torch.maximum(2 * torch.randn(400, 5, 3, 4, generator=generator).double(), low), high)
    sizes = others.flatten(2).abs().sum(2)
    others = others * (eps / sizes).clamp(max=1)[..., None, None]
    assert ((delta - found) * (others - found)).flatten(2).sum(2).max() <= 1e-9
    unlimited = l1_project(delta, 1.0)
    torch.testing.assert_close(BALLS["l1"].length(unlimited), torch.ones(5).double())


def test_pgd_in_l1_reaches_the_optimum_of_a_linear_model():
    """In the box: the coordinates of the largest slope move first, each as far as it can."""
    model = linear(40)
    inputs = torch.rand(10, 40, generator=torch.Generator().manual_seed(3)).double()
    labels = model(inputs).argmax(1)
    threat = ThreatModel(norm="l1", eps=2.0)
    found = PGD(threat, steps=100, loss="margin")(model, inputs, labels)
    slope = (model.weight[1] - model.weight[0]).detach()
    for sample, label, moved in zip(inputs, labels, found, strict=True):
        way, left, best = (slope if label == 0 else -slope), threat.eps, 0.0
        for index in way.abs().argsort(descending=True):
            step = min(left, float(1 - sample[index] if way[index] > 0 else sample[index]))
            best, left = best + step * float(way[index].abs()), left - step
        assert float(((moved - sample) * way).sum()) >= 0.97 * best


def test_a_loss_of_the_users_own_under_l1():
    inputs, labels = batch(6)
    adversarial = PGD(ThreatModel(norm="l1", eps=0.5), loss=square_error)(classifier(6), inputs, labels)
    assert (adversarial - inputs).abs().sum(1).max() <= 0.5 + 1e-6
