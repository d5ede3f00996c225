"""The adapter: on plain images it is torchattacks itself, bit for bit; elsewhere it makes torchattacks work."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchattacks
from support.modules import batch, classifier
from torch import nn

from lightning_wdefense.attacks import ATTACKS, PGD, ThreatModel, TorchAttack, get_attack

MODEL = classifier(3, 8, 8, classes=6, scale=5.0)
X, Y = batch(3, 8, 8, model=MODEL, n=14)
SEED = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
LINF, L2 = ThreatModel(eps=0.03), ThreatModel(norm="l2", eps=0.25)


norms = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
PARTS = {
    "apgd-ce": (torchattacks.APGD, {"loss": "ce", "steps": 100}),
    "apgd-t": (torchattacks.APGDT, {"n_classes": 6, "steps": 100}),
    "fab-t": (torchattacks.FAB, {"n_classes": 6, "multi_targeted": True, "steps": 100}),
    "square": (torchattacks.Square, {"n_queries": 5000}),
}


def adapted(part, threat, **options):
    """A part of AutoAttack, of torchattacks, through the adapter."""
    cls, published = PARTS[part]
    settings = {key: value for key, value in published.items() if key != "n_classes"}
    return TorchAttack(cls.__name__, threat, **settings | options)


def assert_part_is_torchattacks(part, threat, shorter):
    """The same inputs come out, bit for bit but for rounding; ``shorter`` replaces settings of both."""
    cls, published = PARTS[part]
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    expected = cls(MODEL, norm=norm, eps=threat.eps, seed=SEED, **published | shorter)(X, Y)
    broken = MODEL(expected).argmax(1) != Y
    assert 0 < broken.float().mean() < 1, "too easy or too hard to show anything"
    got = adapted(part, threat, **shorter)(MODEL, X, Y)
    assert torch.equal(MODEL(got).argmax(1) != Y, broken)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@norms
@pytest.mark.parametrize("part", PARTS)
def test_autoattacks_parts_are_those_of_torchattacks(part, threat):
    assert_part_is_torchattacks(part, threat, {"n_queries": 200} if part == "square" else {"steps": 12})


@pytest.mark.slow
@norms
@pytest.mark.parametrize("part", PARTS)
def test_autoattacks_parts_at_the_published_settings(part, threat):
    assert_part_is_torchattacks(part, threat, {})


@pytest.mark.parametrize(
    ("name", "threat", "options"),
    [
        ("FGSM", LINF, {}),
        ("PGD", LINF, {"alpha": 0.02, "steps": 7, "random_start": False}),
        ("MIFGSM", LINF, {"steps": 5}),
        ("PGDL2", L2, {"alpha": 0.1, "random_start": False}),
        ("PGD", LINF, {"alpha": 0.02}),
        ("PGDL2", L2, {}),
    ],
)
def test_other_attacks(name, threat, options):
    torch.manual_seed(SEED)
    expected = getattr(torchattacks, name)(MODEL, eps=threat.eps, **options)(X, Y)
    torch.testing.assert_close(TorchAttack(name, threat, **options)(MODEL, X, Y), expected, atol=1e-5, rtol=0)


PICKY = {
    "TIFGSM": "takes three channels, and its kernel needs bigger images",
    "JSMA": "assumes ten classes",
}
RUNNABLE = sorted(
    name
    for name, value in vars(torchattacks).items()
    if isinstance(value, type)
    and issubclass(value, torchattacks.attack.Attack)
    and name not in ("Attack", "MultiAttack", "LGV", "VANILA", *PICKY)
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "AutoAttack")) for name in RUNNABLE]
)  # which asks 5000 queries, and takes no options
def test_every_torchattack_stays_legal(name):
    """Attacks without a radius of their own (CW, DeepFool, OnePixel...) are projected into the ball."""
    threat = L2 if name.endswith("L2") else LINF
    small = {"steps": 3, "n_queries": 20, "max_iterations": 10, "binary_search_steps": 2, "nb_iter": 3, "popsize": 4}
    options = {k: v for k, v in small.items() if k in inspect.signature(getattr(torchattacks, name)).parameters}
    attack = TorchAttack(name, threat, **options)
    assert attack.name == name.lower()
    adversarial = attack(MODEL, X[:4], Y[:4])
    assert torch.isfinite(adversarial).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert threat.ball.length(adversarial - X[:4]).max() <= threat.eps + 1e-6


def test_options_and_step_size_follow_the_radius():
    attack = TorchAttack("PGD", ThreatModel(eps=0.4), alpha=0.1, steps=3, seed=7)
    half = attack.with_eps(0.2)
    assert half.options == {"alpha": pytest.approx(0.05), "steps": 3}
    assert attack.options == {"alpha": 0.1, "steps": 3}
    assert half.seed == 7
    assert attack.with_eps(0.0).options["alpha"] == 0.1
    assert attack != half
    assert "alpha=0.1" in repr(attack)
    assert "seed=7" in repr(attack)


def test_a_radius_is_rescaled_with_the_bounds():
    """eps is in data units; torchattacks works on [0, 1]."""
    expected = adapted("apgd-ce", LINF, steps=20)(MODEL, X, Y)
    for bounds in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        low, span = bounds[0], bounds[1] - bounds[0]
        attack = adapted("apgd-ce", ThreatModel(eps=0.03 * span, bounds=bounds), steps=20)

        def model(x, low=low, span=span):
            return MODEL((x - low) / span)

        found = (attack(model, X * span + low, Y) - low) / span
        same = (found - expected).flatten(1).abs().amax(1) < 1e-3
        assert same.float().mean() > 0.85  # rounding may flip a sign on the way


@pytest.mark.parametrize("classes", [4, 5, 10, 12])
def test_the_number_of_classes_is_read_off_the_outputs(classes, monkeypatch):
    """Targeted parts aim at the nine likeliest wrong classes, or at all if there are fewer."""
    built = []
    for name in ("APGDT", "FAB"):
        original = getattr(torchattacks, name)

        class Spy(original):
            def __init__(self, model, n_classes=10, multi_targeted=True, steps=1, eps=0.1, norm="Linf", seed=0):
                extra = {"multi_targeted": True} if "FAB" in type(self).__mro__[1].__name__ else {}
                super().__init__(model, n_classes=n_classes, steps=steps, eps=eps, norm=norm, seed=seed, **extra)
                built.append(self.n_target_classes)

        monkeypatch.setattr(torchattacks, name, Spy)
    model = classifier(3, 8, 8, classes=classes)
    for part in ("apgd-t", "fab-t"):
        adapted(part, LINF, steps=1)(model, X, Y % classes)
    assert built == [min(classes, 10) - 1] * 2


@pytest.mark.parametrize(
    ("shape", "threat"),
    [
        ((30,), LINF.with_eps(0.15)),
        ((4, 8), L2.with_eps(0.6)),
        ((1, 4, 4), L2.with_eps(0.6)),
        ((3, 4, 10), LINF.with_eps(0.15)),
    ],
    ids=["(30,)-linf", "(4, 8)-l2", "(1, 4, 4)-l2", "(3, 4, 10)-linf"],
)
def test_inputs_that_are_no_square_images_are_attacked_in_earnest(shape, threat):
    """Laid out on a grid the attacks keep their strength: about what PGD finds."""
    model = classifier(*shape, scale=5.0)
    inputs, labels = batch(*shape, model=model, n=48)

    def left(attack):
        return (model(attack(model, inputs, labels)).argmax(1) == labels).float().mean().item()

    pgd = left(PGD(threat, steps=40))
    assert pgd < 0.95
    for part in ("apgd-ce", "apgd-t", "fab-t"):
        assert left(adapted(part, threat, steps=30)) <= pgd + 0.05, part
    assert left(adapted("square", threat, n_queries=200)) < 1


def test_stray_inputs_keep_their_place():
    """Values a little outside the bounds are shown to torchattacks clamped, and stay within the radius of themselves."""
    inputs = X.clone()
    inputs[0, 0, 0, 0] = 1.3
    for name, options in (("apgd-ce", {"steps": 10}), ("fab-t", {"steps": 10}), ("square", {"n_queries": 100})):
        with pytest.warns(UserWarning, match="A few input values"):
            adversarial = adapted(name, LINF, **options)(MODEL, inputs, Y)
        assert (adversarial - inputs).abs().max() <= LINF.eps + 1e-6


def test_the_registry_and_the_names_agree():
    others = {"apgd": "apgd-ce", "fab": "fab-t"}
    for name in ATTACKS:
        threat = ThreatModel("wasserstein", 0.03) if name == "wasserstein" else LINF
        attack = get_attack(name, threat)
        assert attack.name == attack.with_eps(0.01).name == others.get(name, name)


def test_black_box_queries_build_no_graph():
    seen = []

    def model(x):
        seen.append(torch.is_grad_enabled())
        return MODEL(x)

    adapted("square", LINF, n_queries=5)(model, X, Y)
    assert len(seen) > 5
    assert seen[0]  # whose graph says whether these are probabilities
    assert not any(seen[1:])


def test_float16_gradients_do_not_underflow():
    """torchattacks divides the loss by the batch on top."""
    model = torch.nn.Linear(64, 3)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([20.0, 0.0, 0.0]))
    inputs, labels = torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
    flat = torch.nn.Sequential(torch.nn.Flatten(), model)
    attack = TorchAttack("PGD", ThreatModel(eps=0.05), random_start=False)
    expected = attack(flat, inputs, labels) - inputs
    with torch.autocast("cpu", torch.float16):
        moved = attack(flat, inputs, labels) - inputs
    assert (moved.sign() == expected.sign()).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_may_be_another(dtype):
    # As it is inside Lightning's "true" precisions.
    class Making(nn.Linear):
        def forward(self, x):
            made.add(torch.zeros(1).dtype)
            return super().forward(x)

    made = set()
    model = Making(8, 5, dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        attack = adapted("apgd-ce", ThreatModel(eps=0.1), steps=3)
        adversarial = attack(model, torch.rand(4, 8, dtype=dtype), torch.tensor([0, 1, 2, 3]))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)
    assert adversarial.dtype == dtype
    assert made == {dtype}
