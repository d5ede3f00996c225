"""Mistakes that users make, and what they are told."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from support.attacks import ATTACK_CASES, OWN_CASES
from support.modules import batch, classifier

from lightning_wdefense import (
    AdversarialExampleLogger,
    DetectionMonitor,
    Recipe,
    RobustnessMonitor,
    WassersteinDefense,
)
from lightning_wdefense.attacks import (
    APGD,
    FAB,
    FGSM,
    PGD,
    Attack,
    AutoAttack,
    FeatureScattering,
    GibbsNoise,
    LagrangianAttack,
    SinkhornAttack,
    SoftBallPGD,
    Square,
    ThreatModel,
    TorchAttack,
    WassersteinAttack,
    get_attack,
    wasserstein_feasibility,
)

LINF, L2 = ThreatModel(eps=0.1), ThreatModel(norm="l2", eps=0.1)
WASSERSTEIN = ThreatModel(norm="wasserstein", eps=0.1)
UNBOUNDED = ThreatModel(eps=0.1, bounds=None)

CONFIGURATIONS = {
    "eps negative": (lambda: ThreatModel(eps=-0.1), "eps must be finite and not negative.*-0.1"),
    "eps inf": (lambda: ThreatModel(eps=float("inf")), "eps must be finite"),
    "eps nan": (lambda: ThreatModel(eps=float("nan")), "eps must be finite"),
    "with_eps": (lambda: PGD(LINF).with_eps(-1), "eps must be finite"),
    "bounds reversed": (lambda: ThreatModel(bounds=(1, 0)), r"bounds must be \(low, high\) with low < high.*\(1, 0\)"),
    "bounds equal": (lambda: ThreatModel(bounds=(1, 1)), "bounds must be"),
    "bounds of three": (lambda: ThreatModel(bounds=(0, 1, 2)), "bounds must be"),
    "bounds nan": (lambda: ThreatModel(bounds=(0, float("nan"))), "bounds must be"),
    "bounds infinite": (lambda: ThreatModel(bounds=(0, float("inf"))), "bounds must be.*or None"),
    "std zero": (lambda: ThreatModel(std=(0.5, 0.0)), "std must be positive"),
    "std negative": (lambda: ThreatModel(std=-1.0), "std must be positive"),
    "norm unknown": (lambda: ThreatModel(norm="Linf"), "no norm 'Linf'. Did you mean 'linf'"),
    "norm l3": (lambda: ThreatModel(norm="l3"), "no norm 'l3'.*'l2'"),
    "attack unknown": (lambda: get_attack("auto-attack", LINF), "no attack 'auto-attack'. Did you mean 'autoattack'"),
    "torchattack in l1": (
        lambda: TorchAttack("PGD", ThreatModel(norm="l1")),
        "in norm 'linf' or 'l2', not in norm 'l1'",
    ),
    "torchattack unknown": (lambda: TorchAttack("APDG", LINF), "no torchattacks attack 'APDG'. Did you mean .*'APGD'"),
    "torchattack option": (lambda: TorchAttack("PGD", LINF, stepz=3), "no option of PGD 'stepz'. Did you mean 'steps'"),
    "torchattack eps": (lambda: TorchAttack("PGD", LINF, eps=0.3), "taken from the threat model"),
    "torchattack norm": (lambda: TorchAttack("APGD", LINF, norm="L2"), "taken from the threat model"),
    "torchattack model": (lambda: TorchAttack("PGD", LINF, model=None), "no option of PGD 'model'"),
    "PGDL2 with linf": (lambda: TorchAttack("PGDL2", LINF), "PGDL2 cannot attack in norm 'linf'"),
    "PGD with l2": (lambda: TorchAttack("PGD", L2), "PGD cannot attack in norm 'l2'"),
    "MIFGSM with l2": (lambda: TorchAttack("MIFGSM", L2), "MIFGSM cannot attack in norm 'l2'"),
    "no bounds": (lambda: TorchAttack("APGD", UNBOUNDED), 'APGD needs a bounded input range.*"pgd"'),
    "pgd wasserstein": (lambda: PGD(WASSERSTEIN), "'wasserstein' has no ball in pixel space"),
    "fgsm wasserstein": (lambda: FGSM(WASSERSTEIN), "'wasserstein' has no ball in pixel space"),
    "torchattacks wasserstein": (lambda: TorchAttack("APGD", WASSERSTEIN), "'wasserstein' has no ball"),
    "autoattack wasserstein": (lambda: AutoAttack(WASSERSTEIN), "not in norm 'wasserstein'.*WassersteinAttack"),
    "apgd wasserstein": (lambda: APGD(WASSERSTEIN), "APGD attacks in norm 'linf' or 'l2', not in norm 'wasserstein'"),
    "fab wasserstein": (lambda: FAB(WASSERSTEIN), "FAB attacks in norm"),
    "square wasserstein": (lambda: get_attack("square", WASSERSTEIN), "Square attacks in norm"),
    "apgd loss": (lambda: APGD(LINF, loss="dlr-target"), "no loss of APGD 'dlr-target'. Did you mean 'dlr-targeted'"),
    "apgd rho": (lambda: APGD(LINF, rho=0.0), "rho must lie between 0 and 1, got 0.0"),
    "apgd targets": (lambda: APGD(LINF, targets=0), "targets must be at least 1, got 0"),
    "fab steps": (lambda: FAB(LINF, steps=0), "steps must be at least 1, got 0"),
    "square p": (lambda: Square(LINF, p_init=1.5), "p_init must lie between 0 and 1, got 1.5"),
    "square queries": (lambda: Square(LINF, queries=0), "queries must be at least 1, got 0"),
    "steps 0": (lambda: PGD(LINF, steps=0), "steps must be at least 1, got 0"),
    "restarts 0": (lambda: PGD(LINF, restarts=0), "restarts must be at least 1"),
    "step size 0": (lambda: PGD(LINF, step_size=0.0), "step_size must be positive"),
    "step size nan": (lambda: PGD(LINF, step_size=float("nan")), "step_size must be positive"),
    "random start": (lambda: PGD(LINF, random_start="normal"), "random_start must be.*'normal'"),
    "kl at the start": (lambda: PGD(LINF, loss="kl", random_start=False), 'loss="kl" has zero gradient'),
    "early exit": (lambda: PGD(LINF, early_exit=True, loss="kl"), "early_exit=True.*loss='kl'.*\"margin\""),
    "fgsm kl": (lambda: FGSM(LINF, loss="kl"), 'loss="kl" has zero gradient.*noise'),
    "loss unknown": (lambda: PGD(LINF, loss="cee"), "no attack loss 'cee'. Did you mean 'ce'"),
    "fgsm loss unknown": (lambda: FGSM(LINF, loss="cw"), "no attack loss 'cw'"),
    "noise negative": (lambda: FGSM(LINF, noise=-1.0), "noise must not be negative"),
    "soft ball multiplier": (lambda: SoftBallPGD(LINF, multiplier=-0.1), "multiplier must be finite and not neg.*-0.1"),
    "soft ball nan": (lambda: SoftBallPGD(LINF, multiplier=float("nan")), "multiplier must be finite.*nan"),
    "soft ball rate": (lambda: SoftBallPGD(LINF, multiplier_rate=-1.0), "multiplier_rate must be finite.*-1.0"),
    "soft ball steps": (lambda: SoftBallPGD(LINF, steps=0), "steps must be at least 1, got 0"),
    "lagrangian gamma": (lambda: LagrangianAttack(LINF, gamma=0.0), "gamma must be positive.*None, got 0.0"),
    "lagrangian gamma inf": (lambda: LagrangianAttack(LINF, gamma=float("inf")), "gamma must be positive and finite"),
    "lagrangian step size": (lambda: LagrangianAttack(LINF, step_size=-1.0), "step_size must be positive.*-1.0"),
    "lagrangian steps": (lambda: LagrangianAttack(LINF, steps=0), "steps must be at least 1, got 0"),
    "lagrangian kl": (lambda: LagrangianAttack(LINF, loss="kl"), 'loss="kl" has zero gradient.*use "ce"'),
    "lagrangian loss": (lambda: LagrangianAttack(LINF, loss="mse"), "no attack loss 'mse'"),
    "lagrangian wasserstein": (lambda: LagrangianAttack(WASSERSTEIN), "'wasserstein' has no ball"),
    "scattering steps": (lambda: FeatureScattering(LINF, steps=0), "steps must be at least 1, got 0"),
    "scattering step size": (lambda: FeatureScattering(LINF, step_size=0.0), "step_size must be positive.*0.0"),
    "scattering wasserstein": (lambda: FeatureScattering(WASSERSTEIN), "'wasserstein' has no ball"),
    "sinkhorn steps": (lambda: SinkhornAttack(LINF, steps=0), "steps must be at least 1, got 0"),
    "sinkhorn step size": (lambda: SinkhornAttack(LINF, step_size=0.0), "step_size must be positive.*0.0"),
    "sinkhorn weight": (lambda: SinkhornAttack(LINF, weight=-1.0), "weight must be finite and not negative, got -1.0"),
    "sinkhorn kl": (lambda: SinkhornAttack(LINF, loss="kl"), 'loss="kl" does not say.*"margin"'),
    "sinkhorn loss": (lambda: SinkhornAttack(LINF, loss="cee"), "no attack loss 'cee'"),
    "sinkhorn wasserstein": (lambda: SinkhornAttack(WASSERSTEIN), "'wasserstein' has no ball"),
    "gibbs spread": (lambda: GibbsNoise(LINF, spread=-0.1), "spread must be finite and not negative.*-0.1"),
    "gibbs temperature": (lambda: GibbsNoise(LINF, temperature=0.0), "temperature must be positive.*0.0"),
    "gibbs copies": (lambda: GibbsNoise(LINF, copies=0), "copies must be at least 1, got 0"),
    "gibbs loss": (lambda: GibbsNoise(LINF, loss="cee"), "no attack loss 'cee'"),
    "gibbs wasserstein": (lambda: GibbsNoise(WASSERSTEIN), "'wasserstein' has no ball"),
    "wasserstein linf": (
        lambda: WassersteinAttack(LINF),
        "needs ThreatModel\\(norm=\"wasserstein\"\\), got norm='linf'",
    ),
    "wasserstein by name": (lambda: get_attack("wasserstein", L2), "needs ThreatModel.*got norm='l2'"),
    "wasserstein bounds": (
        lambda: WassersteinAttack(ThreatModel("wasserstein", 0.1, bounds=(-1, 1))),
        r"bounds must begin with 0.*got \(-1.0, 1.0\).*mean= and std=",
    ),
    "wasserstein eps": (lambda: ThreatModel("wasserstein", -0.1), "eps must be finite and not negative.*-0.1"),
    "wasserstein method": (
        lambda: WassersteinAttack(WASSERSTEIN, methods="frank-wolf"),
        "no method 'frank-wolf'. Did you mean 'frank-wolfe'",
    ),
    "wasserstein methods": (lambda: WassersteinAttack(WASSERSTEIN, methods=()), "methods= is empty: name.*projected"),
    "wasserstein even": (lambda: WassersteinAttack(WASSERSTEIN, neighbourhood=4), "must be odd and at least 3.*got 4"),
    "wasserstein one": (lambda: WassersteinAttack(WASSERSTEIN, neighbourhood=1), "must be odd and at least 3.*got 1"),
    "wasserstein p": (lambda: WassersteinAttack(WASSERSTEIN, p=3), "p must be 1 or 2, got 3"),
    "wasserstein steps": (lambda: WassersteinAttack(WASSERSTEIN, steps=0), "steps must be at least 1, got 0"),
    "wasserstein restarts": (lambda: WassersteinAttack(WASSERSTEIN, restarts=0), "restarts must be at least 1, got 0"),
    "wasserstein loss": (lambda: WassersteinAttack(WASSERSTEIN, loss="cee"), "no attack loss 'cee'"),
    "wasserstein early exit": (
        lambda: WassersteinAttack(WASSERSTEIN, loss="kl", early_exit=True),
        "early_exit=True.*loss='kl'.*\"margin\"",
    ),
    "autoattack steps": (lambda: AutoAttack(LINF, steps=0), "steps must be at least 1"),
    "autoattack queries": (lambda: AutoAttack(LINF, queries=0), "queries must be at least 1"),
}


@pytest.mark.parametrize(("build", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configuration(build, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        build()


NEED_A_THREAT = {
    **{
        cls.__name__: cls
        for cls in (FGSM, PGD, SoftBallPGD, LagrangianAttack, FeatureScattering, SinkhornAttack, GibbsNoise)
    },
    "WassersteinAttack": WassersteinAttack,
    **{cls.__name__: cls for cls in (APGD, FAB, Square, AutoAttack)},
    "TorchAttack": lambda threat: TorchAttack("PGD", threat),
    "get_attack": lambda threat: get_attack("pgd", threat),
    "feasibility": lambda threat: wasserstein_feasibility(FULL, FULL, threat),
    "recipe": lambda threat: Recipe.named("pgd-at", threat),
    "defense": lambda threat: WassersteinDefense("pgd-at", threat=threat),
    "defense beside a recipe": lambda threat: WassersteinDefense(Recipe(None, "clean"), threat=threat),
    "monitor": RobustnessMonitor,
    "monitor of attacks": lambda threat: RobustnessMonitor(threat, [PGD(LINF)]),
    "examples": AdversarialExampleLogger,
    "detection": DetectionMonitor,
}


@pytest.mark.parametrize("make", NEED_A_THREAT.values(), ids=NEED_A_THREAT)
@pytest.mark.parametrize(
    ("threat", "message"),
    [
        (0.1, r"threat model, such as ThreatModel\(eps=0.1\).*got a float: 0.1"),
        ("linf", r"such as ThreatModel\(eps=8 / 255\).*got a str: 'linf'"),
        ({"eps": 0.1}, "got a dict"),
    ],
    ids=["radius", "norm", "dict"],
)
def test_a_threat_is_a_threat_model(make, threat, message):
    with pytest.raises(TypeError, match=message):
        make(threat)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LINF, r"got a ThreatModel: write WassersteinDefense\(threat=ThreatModel\("),
        (0.1, "got a float"),
        (None, "got a NoneType"),
    ],
)
def test_a_recipe_is_a_name_or_a_recipe(recipe, message):
    with pytest.raises(TypeError, match=message):
        WassersteinDefense(recipe)
    if recipe is LINF:
        assert WassersteinDefense(threat=recipe).recipe.threat == LINF


def test_eps_larger_than_the_range_is_warned_of():
    for eps, bounds in ((8, (0, 1)), (1.01, (0, 1)), (256, (0, 255))):
        with pytest.warns(UserWarning, match=rf"eps={eps:g} is larger than the whole range of the bounds.*eps=8 / 255"):
            ThreatModel(eps=eps, bounds=bounds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for threat in (LINF.with_eps(1), ThreatModel(eps=8, bounds=(0, 255)), ThreatModel(eps=8, bounds=None)):
            assert threat.eps
        ThreatModel("l2", 8)  # the ball's corners are farther away than one pixel's range


@pytest.mark.parametrize("divergence", ["sinkhorn", 0.1])
def test_a_divergence_is_callable(divergence):
    with pytest.raises(TypeError, match=re.escape(f"SinkhornDivergence(), or None, got {divergence!r}")):
        FeatureScattering(LINF, divergence=divergence)


every_attack = pytest.mark.parametrize("case", ATTACK_CASES.values(), ids=ATTACK_CASES)
own_attacks = pytest.mark.parametrize("case", OWN_CASES.values(), ids=OWN_CASES)

X, Y = batch(3, 4, 4)
MODEL = classifier(3, 4, 4)


def assert_refuses(call, rows):
    """Rows by name: the arguments of the call, the error that they lead to and the pattern of its message. Names those that fail."""
    failed = {}
    for name, (*arguments, error, message) in rows.items():
        try:
            call(*arguments)
        except Exception as raised:
            if not (isinstance(raised, error) and re.search(message, str(raised), re.DOTALL)):
                failed[name] = raised
        else:
            failed[name] = "no error"
    assert not failed


INPUTS = {
    "integer images": (ThreatModel(), (255 * X).to(torch.uint8), TypeError, "torch.uint8.*x.float\\(\\) / 255"),
    "long": (ThreatModel(), X.long(), TypeError, "floating-point inputs"),
    "numpy": (ThreatModel(), X.numpy(), TypeError, "must be a tensor, got ndarray.*inputs="),
    "dict": (ThreatModel(), {"x": X}, TypeError, "must be a tensor, got dict"),
    "empty": (ThreatModel(), X[:0], ValueError, r"at least one sample, got shape \(0, 3, 4, 4\)"),
    "scalar": (ThreatModel(), torch.tensor(0.5), ValueError, "at least one sample"),
    "empty dimension": (ThreatModel(), X[..., :0], ValueError, r"empty dimension.*\(8, 3, 4, 0\)"),
    "normalised": (ThreatModel(), (X - 0.5) / 0.2, ValueError, "lie outside.*mean and std are not set.*mean=..., std="),
    "0 to 255": (ThreatModel(), 255 * X, ValueError, "lie outside.*they run from .* to 25.*bounds="),
    "2% outside": (ThreatModel(), torch.where(torch.rand_like(X) < 0.1, 1.2, X), ValueError, "lie outside"),
    "wrong statistics": (
        ThreatModel(mean=0.5, std=0.5),
        10 * X,
        ValueError,
        r"mean=\(0.5,\) and std=\(0.5,\) are not those",
    ),
    "mean of two": (ThreatModel(mean=(0.5, 0.5)), X, ValueError, r"mean has 2 values.*\(8, 3, 4, 4\).*does not"),
    "std of four": (ThreatModel(std=(1, 1, 1, 1)), X, ValueError, "std has 4 values"),
    "statistics without channels": (ThreatModel(mean=(0.1, 0.2)), X[:, 0, 0, 0], ValueError, "mean has 2 values"),
    "one nan": (ThreatModel(), torch.where(X.max() == X, torch.nan, X), ValueError, "NaN or infinite"),
    "one inf": (ThreatModel(), torch.where(X.max() == X, torch.inf, X), ValueError, "NaN or infinite"),
}


@every_attack
def test_inputs(case):
    assert_refuses(lambda threat, inputs: case(threat)(MODEL, inputs, Y), INPUTS)


@own_attacks
def test_not_finite_without_bounds(case):
    rows = {
        str(bad): (torch.where(X.max() == X, bad, X), ValueError, "NaN or infinite") for bad in (torch.nan, torch.inf)
    }
    assert_refuses(lambda inputs: case(UNBOUNDED)(MODEL, inputs, Y), rows)


FULL = torch.rand(4, 1, 6, 7)
TRANSPORT = {
    "a table": (ThreatModel("wasserstein", 0.1), FULL[:, 0, 0], r"for images \(N, C, H, W\), got.*\(4, 7\)"),
    "no channels": (ThreatModel("wasserstein", 0.1), FULL[:, 0], r"for images \(N, C, H, W\), got.*\(4, 6, 7\)"),
    "smaller than the square": (
        ThreatModel("wasserstein", 0.1),
        FULL[:, :, :4],
        "are 4 x 7, smaller than the neighbourhood, 5 x 5: lower neighbourhood=",
    ),
    "negative": (
        ThreatModel("wasserstein", 0.1, bounds=None),
        FULL - 0.5,
        "Pixels are mass, which cannot be negative, but.*go down to -0.*mean=.*std=",
    ),
    "no mass": (ThreatModel("wasserstein", 0.1), FULL * torch.tensor([1.0, 0, 1, 0])[:, None, None, None], r"\[1, 3\]"),
    "no mass in the pipeline's units": (
        ThreatModel("wasserstein", 0.1, mean=0.4, std=0.3),
        (FULL * (torch.arange(4) > 0)[:, None, None, None] - 0.4) / 0.3,
        r"without any mass have nothing to move: samples \[0\]",
    ),
}


@pytest.mark.parametrize(("threat", "inputs", "message"), TRANSPORT.values(), ids=TRANSPORT)
def test_images_for_transport(threat, inputs, message):
    """The attack says so, and so does what measures it."""
    kept = inputs.clone()
    model = lambda x: x.flatten(1)[:, :3] - 0.1  # noqa: E731
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        WassersteinAttack(threat)(model, inputs, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        wasserstein_feasibility(inputs, inputs, threat)
    assert torch.equal(inputs, kept)


FEASIBILITY = {
    "shapes": ({"adversarial": FULL[:2]}, r"same shape, got \(4, 1, 6, 7\) and \(2, 1, 6, 7\)"),
    "norm": ({"threat": LINF}, "got norm='linf'"),
    "even": ({"neighbourhood": 6}, "odd and at least 3.*got 6"),
    "too large": ({"neighbourhood": 7}, "6 x 7, smaller than the neighbourhood, 7 x 7"),
    "p": ({"p": 0}, "p must be 1 or 2, got 0"),
    "units": ({"inputs": 255 * FULL}, "lie outside.*mean and std are not set"),
}


@pytest.mark.parametrize(("changes", "message"), FEASIBILITY.values(), ids=FEASIBILITY)
def test_feasibility(changes, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        wasserstein_feasibility(**{"inputs": FULL, "adversarial": FULL, "threat": WASSERSTEIN} | changes)


LABELS = {
    "none": (None, TypeError, "labels must be a tensor, got NoneType.*labels="),
    "list": ([0] * 8, TypeError, "labels must be a tensor, got list"),
    "too few": (Y[:5], ValueError, r"shape \(5,\); for outputs of shape \(8, 5\).*indices of shape \(8,\)"),
    "column": (Y[:, None], ValueError, r"shape \(8, 1\)"),
    "too large": (Y * 0 + 5, ValueError, "run from 5 to 5, but the model has 5 classes"),
    "negative": (Y - Y - 1, ValueError, "run from -1 to -1.*0..4"),
    "float indices": (Y.float(), ValueError, r"Soft labels must have the shape.*labels.long\(\)"),
    "soft, wrong shape": (torch.ones(8, 4) / 4, ValueError, r"shape of the logits, \(8, 5\), got \(8, 4\)"),
    "soft, not a distribution": (torch.ones(8, 5), ValueError, "sum to 1"),
    "soft, negative": (torch.tensor([[2.0, -1, 0, 0, 0]] * 8), ValueError, "non-negative"),
}
LABELLED = {
    name: case for name, case in ATTACK_CASES.items() if case.labelled and name != "pgd-callable"
}  # that one takes whatever its loss takes


@pytest.mark.parametrize("case", LABELLED.values(), ids=LABELLED)
def test_labels(case):
    assert_refuses(lambda labels: case(LINF)(MODEL, X, labels), LABELS)


OUTPUTS = {
    "tuple": (lambda x: (MODEL(x), x), TypeError, "not logits but a tuple.*forward.*model=.*loss="),
    "none": (lambda x: None, TypeError, "not logits but a NoneType"),
    "dict without logits": (lambda x: {"scores": MODEL(x)}, TypeError, "not logits but a dict"),
    "predictions": (lambda x: MODEL(x).argmax(1), TypeError, "not logits: torch.int64"),
    "scalar": (lambda x: MODEL(x).sum(), TypeError, "not logits"),
    "probabilities": (lambda x: MODEL(x).softmax(1), ValueError, "look like probabilities"),
}


NAMED_LOSS = {name: case for name, case in ATTACK_CASES.items() if name != "pgd-callable"}  # that one takes any outputs


@pytest.mark.parametrize("case", NAMED_LOSS.values(), ids=NAMED_LOSS)
def test_outputs(case):
    assert_refuses(lambda model: case(LINF)(model, X, Y), OUTPUTS)


def _no_grad(x):
    with torch.no_grad():
        return MODEL(x)


NOT_DIFFERENTIABLE = {
    "inputs detached": lambda x: MODEL(x.detach()),
    "outputs detached": lambda x: MODEL(x).detach(),
    "no_grad": _no_grad,
    "rounded": lambda x: MODEL((x * 255).to(torch.uint8).float() / 255),
}


@every_attack
def test_not_differentiable(case):
    """Gradient attacks say so."""
    if not case.differentiates:
        for model in NOT_DIFFERENTIABLE.values():
            case(LINF)(model, X, Y)
        return
    message = "do not depend differentiably on its inputs.*detach"
    rows = {name: (model, ValueError, message) for name, model in NOT_DIFFERENTIABLE.items()}
    assert_refuses(lambda model: case(LINF)(model, X, Y), rows)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda z, y: z.mean(), r"\(\)"),
        (lambda z, y: z[:3, 0], r"\(3,\)"),
        (lambda z, y: z.sum(0), r"\(5,\)"),
        (lambda z, y: 0.5, "float"),
        (lambda z, y: None, "NoneType"),
    ],
)
@pytest.mark.parametrize("attack", [FGSM, PGD, LagrangianAttack, GibbsNoise])
def test_callable_losses(attack, loss, shape):
    with pytest.raises(ValueError, match=rf"one loss per sample, shape \(8,\) here, got {shape}"):
        attack(LINF, loss=loss)(MODEL, X, Y)


def test_callable_loss_without_gradient():
    with pytest.raises(ValueError, match="do not depend differentiably"):
        PGD(LINF, loss=lambda z, y: (z.argmax(1) != y).float())(MODEL, X, Y)


TOO_FEW_CLASSES = {
    "apgd-t": (TorchAttack("APGDT", LINF), 3, "APGDT needs at least 4 classes, this model has 3.*autoattack"),
    "AutoAttack preset": (TorchAttack("AutoAttack", LINF), 3, "AutoAttack needs at least 4 classes"),
    "dlr": (TorchAttack("APGD", LINF, loss="dlr"), 2, "APGD needs at least 3 classes"),
}


@pytest.mark.parametrize(("attack", "classes", "message"), TOO_FEW_CLASSES.values(), ids=TOO_FEW_CLASSES)
def test_too_few_classes(attack, classes, message):
    with pytest.raises(ValueError, match=message):
        attack(classifier(3, 4, 4, classes=classes), X, Y * 0)


def test_segmentation_is_not_for_torchattacks():
    model = torch.nn.Conv2d(3, 4, 1)
    labels = torch.zeros(8, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="one label per sample"):
        TorchAttack("APGD", LINF)(model, X, labels)
    with pytest.raises(ValueError, match=r"FAB looks for.*one label per element .*\(8, 4, 4, 4\).*APGD"):
        FAB(LINF)(model, X, labels)


def test_without_torchattacks(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-wdefense\[torchattacks\]"'):
        TorchAttack("PGD", LINF)
    for name in ("pgd", "apgd", "apgd-t", "fab-t", "square", "autoattack"):
        assert isinstance(get_attack(name, LINF), Attack)
