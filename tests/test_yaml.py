"""Every public class survives a round trip through YAML: written, read, built, printed, read and built again."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from support.configurations import Shift
from torch import Tensor, nn

from lightning_wdefense import (
    AdversarialExampleLogger,
    DetectionMonitor,
    Recipe,
    RobustnessAudit,
    RobustnessMonitor,
    ThreatModel,
    WassersteinDefense,
)
from lightning_wdefense.attacks import (
    APGD,
    DDN,
    FAB,
    FGSM,
    FMN,
    PGD,
    Attack,
    AutoAttack,
    Execution,
    FeatureScattering,
    GibbsNoise,
    LagrangianAttack,
    LearnedAttack,
    MinimalAttack,
    MinimalEps,
    MinimalPerturbation,
    Perturb,
    SharedBudgetPGD,
    SinkhornAttack,
    SoftBallPGD,
    Square,
    TorchAttack,
    WassersteinAttack,
    WorstCase,
)
from lightning_wdefense.cli import SuggestingParser, suggestions
from lightning_wdefense.defenses import (
    Certificate,
    ClassTransport,
    CriticDiscrepancy,
    GaussianSmoothing,
    PurifiedClassifier,
    RandomizedSmoothing,
    ResidualGenerator,
    SampleReweighting,
    SlicedTransport,
    Transport,
    WassersteinPurifier,
    WassersteinSmoothing,
    coral,
    get_discrepancy,
)
from lightning_wdefense.defenses.step import DefenseOutput
from lightning_wdefense.defenses.terms import RecipeChanges
from lightning_wdefense.detection import (
    LID,
    CriticScore,
    Detector,
    Energy,
    FeatureSqueezing,
    KernelDensity,
    KNNDistance,
    Mahalanobis,
    MaxSoftmax,
    TwoSampleResult,
    TwoSampleTest,
)
from lightning_wdefense.evaluation import EvaluationResult
from lightning_wdefense.metrics import (
    AUROC,
    AccuracyCurve,
    AttackSuccessRate,
    Detectability,
    DistributionalAccuracy,
    DistributionalCurve,
    RobustAccuracy,
    RobustAccuracyCurve,
    Sensitivity,
    TransportShift,
)
from lightning_wdefense.mixin import WassersteinDefenseMixin
from lightning_wdefense.transport import (
    CriticDistance,
    CriticTraining,
    CriticUpdate,
    SinkhornConvergenceWarning,
    SinkhornDivergence,
    SinkhornResult,
    SlicedWasserstein,
    WarmStart,
    WassersteinCritic,
)

jsonargparse = pytest.importorskip("jsonargparse")

ROOMS = ("", ".attacks", ".callbacks", ".defenses", ".detection", ".metrics", ".transport")


def public_path(cls: type) -> str:
    """Where users find a class. Not its file: ``metrics.detectability`` is a function, which hides the file of the same name."""
    rooms = [importlib.import_module(f"lightning_wdefense{room}") for room in ROOMS]
    return next(f"{room.__name__}.{cls.__name__}" for room in rooms if cls.__name__ in room.__all__)


def by_path(cls: type | str, **arguments: Any) -> dict[str, Any]:
    """An object as YAML names it."""
    path = cls if isinstance(cls, str) else public_path(cls)
    return {"class_path": path, "init_args": arguments}


LOSS = "support.configurations.per_sample_loss"
COST = "support.configurations.squared_cost"
THREAT = {"norm": "l2", "eps": 0.5, "bounds": [0, 2], "mean": [0.5, 0.4], "std": 0.2}
UNBOUNDED = {"eps": 0.1, "bounds": None}
PIXELS = {"norm": "wasserstein", "eps": 0.2}
PLACES = {"inputs": ["x", ["pair", 0]], "labels": ["pair", 1], "outputs": "logits"}
LINEAR = by_path("torch.nn.Linear", in_features=4, out_features=4)
ATTACK = by_path(PGD, threat=THREAT, steps=3)

# What each class takes, by the names of its arguments. An argument whose default does not show its type must be here.
SAMPLES: dict[type, dict[str, Any]] = {
    ThreatModel: THREAT,
    Execution: {"precision": "bf16", "channels_last": True},
    Perturb: {"path": "encoder.embedding", "by": "token", "padding": ["batch", 1]},
    FGSM: {"threat": UNBOUNDED, "noise": 2, "loss": LOSS},
    PGD: {"threat": THREAT, "step_size": 0.1, "random_start": "gaussian", "loss": LOSS},
    SoftBallPGD: {"threat": THREAT, "step_size": 0.1, "random_start": False, "loss": "margin", "multiplier": 0.5},
    SharedBudgetPGD: {"threat": THREAT, "p": 1.5, "step_size": 0.1, "loss": LOSS, "clip": 0.5, "random_start": "gaussian", "all_ranks": False},
    LagrangianAttack: {"threat": THREAT, "gamma": 0.7, "step_size": 0.1, "loss": "margin"},
    FeatureScattering: {"threat": THREAT, "step_size": 0.1, "divergence": by_path(SinkhornDivergence, blur=0.3)},
    GibbsNoise: {"threat": THREAT, "spread": 0.2, "loss": LOSS, "copies": 3},
    SinkhornAttack: {"threat": THREAT, "step_size": 0.1, "loss": LOSS, "divergence": by_path(SinkhornDivergence)},
    WassersteinAttack: {"threat": PIXELS, "methods": ["projected"], "loss": "ce", "neighbourhood": 3},
    FMN: {"threat": THREAT, "steps": 30, "step_size": 1},
    DDN: {"threat": THREAT, "steps": 30},
    MinimalEps: {"attack": ATTACK, "max_eps": 3, "tolerance": 0.1},
    APGD: {"threat": THREAT, "steps": 20, "loss": "dlr-targeted", "targets": 3, "rho": 0.5},
    FAB: {"threat": UNBOUNDED, "steps": 20, "early_exit": False},
    Square: {"threat": {"eps": 0.1}, "queries": 20, "rescale_schedule": True},
    AutoAttack: {"threat": {"eps": 0.1}, "steps": 20},
    TorchAttack: {"attack": "PGD", "threat": {"eps": 0.1}, "seed": 3, "dict_kwargs": {"steps": 4, "alpha": 0.02}},
    WassersteinDefense: {
        "recipe": "trades", "threat": UNBOUNDED, "weight": 3, "features": "penultimate", "warmup_epochs": 1.5, "through": "auto",
        "perturb": {"path": "embedding", "padding": 0}, "model": "net", **PLACES, "ignore_index": 255, "name": "second",
    },
    RobustnessMonitor: {
        "threat": THREAT, "attacks": ["fgsm", ATTACK], "max_batches": 2, "epsilons": [0.1, 0.5], "distances": by_path(FMN, threat=THREAT, steps=30), "p": 1, "features": None, "through": "auto",
        "perturb": {"path": "embedding", "by": "token"}, "model": "net", **PLACES, "dataloaders": [0, 2], "ignore_index": 255,
        "name": "second",
    },
    RobustnessAudit: {
        "threat": THREAT, "attacks": ["fgsm", ATTACK], "samples": 50, "twin": LINEAR, "path": "audit.json", "model": "net", "through": "model", **PLACES,
    },
    AdversarialExampleLogger: {
        "threat": THREAT, "attack": ATTACK, "class_names": ["cat", "dog"], "through": "step", "model": "net", **PLACES,
    },
    DetectionMonitor: {
        "threat": THREAT, "attack": ATTACK, "detectors": ["energy", by_path(KNNDistance, k=3)], "features": "net.head", "max_batches": 2,
        "through": "step", "perturb": "embedding", "model": "net", **PLACES, "dataloaders": [1], "name": "second",
    },
    Recipe: {
        "attack": by_path(PGD, threat=UNBOUNDED, steps=3, loss=LOSS), "sees": "adversarial", "discrepancy": by_path(SlicedWasserstein, p=1),
        "weight": 0.3, "task_loss": "torch.nn.functional.mse_loss", "execution": {"precision": "bf16"}, "ramp_steps": True,
        "reweighting": {"radius": 0.1}, "jacobian_weight": 0.01, "jacobian_directions": "random",
    },
    SampleReweighting: {"radius": None, "temperature": 0.5, "loss": LOSS},
    CriticDiscrepancy: {
        "lipschitz": "one-sided-penalty", "width": 32, "by_class": False, "network": "support.configurations.small_critic",
    },
    ClassTransport: {"relative_blur": 0.3, "relative_label_cost": 5},
    Transport: {"divergence": by_path(SinkhornDivergence, relative_blur=0.3)},
    SlicedTransport: {"distance": by_path(SlicedWasserstein, n_projections=8)},
    ResidualGenerator: {"shape": [1, 8, 8], "width": 8},
    PurifiedClassifier: {"purifier": by_path(ResidualGenerator, shape=4, width=8), "classifier": LINEAR, "bpda": True},
    WassersteinPurifier: {
        "classifier": LINEAR, "threat": THREAT, "attack": ATTACK, "generator": by_path(ResidualGenerator, shape=4, width=8),
        "critic": {"by_class": False}, "evaluation": ATTACK, "inputs": "x", "labels": ["pair", 1],
    },
    WassersteinSmoothing: {"threat": {"norm": "wasserstein", "eps": 0.2}, "ground": "manhattan", "samples": 100},
    GaussianSmoothing: {"sigma": 0.5, "threat": THREAT, "samples": 100},
    MaxSoftmax: {},
    Energy: {},
    Mahalanobis: {},
    KNNDistance: {"k": 3},
    LID: {"k": 3},
    KernelDensity: {"bandwidth": 0.5},
    FeatureSqueezing: {"threat": {"eps": 0.1}, "model": LINEAR, "bits": 3},
    CriticScore: {"critic": "support.configurations.mean_of_features"},
    TwoSampleTest: {"statistic": "mmd", "permutations": 50},
    RobustAccuracy: {"attacks": ["pgd", "square"], "ignore_index": 255},
    AttackSuccessRate: {"ignore_index": 255, "dict_kwargs": {"compute_on_cpu": True}},
    RobustAccuracyCurve: {"epsilons": [0, 0.1], "ignore_index": 255},
    TransportShift: {"blur": 0.3, "reach": 2, "cost": COST, "label_cost": 1, "solver": "native"},
    Detectability: {"resamples": 50, "confidence": 0.9},
    DistributionalAccuracy: {"radii": [0.5, 1], "p": 1.5},
    Sensitivity: {"p": 1.5, "norm": "linf"},
    SinkhornDivergence: {"p": 2, "blur": 0.3, "reach": 2, "cost": "cosine", "label_cost": 1, "solver": "native"},
    SlicedWasserstein: {"p": 1.5, "n_projections": 8, "directions": "max"},
    WassersteinCritic: {"network": [1, 4, 4], "lipschitz": "spectral-norm", "width": 8, "classes": 3},
    CriticTraining: {"critic": by_path(WassersteinCritic, network=4, width=8), "lr": 0.01},
    WarmStart: {},
}  # fmt: skip

RESULT = "a result, which is computed and not configured"
ABSTRACT = "an abstract base class"
EXCLUDED: dict[type, str] = {
    Attack: ABSTRACT,
    MinimalAttack: ABSTRACT,
    LearnedAttack: ABSTRACT,
    Detector: ABSTRACT,
    RandomizedSmoothing: ABSTRACT,
    WassersteinDefenseMixin: "a base class without arguments, for a module of the user's own",
    SinkhornConvergenceWarning: "a warning",
    EvaluationResult: "what evaluate() returns",
    **dict.fromkeys(
        (
            DefenseOutput,
            WorstCase,
            MinimalPerturbation,
            Certificate,
            TwoSampleResult,
            AUROC,
            AccuracyCurve,
            DistributionalCurve,
            CriticDistance,
            CriticUpdate,
            SinkhornResult,
        ),
        RESULT,
    ),
}


def public_classes() -> set[type]:
    rooms = [importlib.import_module(f"lightning_wdefense{room}") for room in ROOMS]
    return {it for room in rooms for name in room.__all__ if inspect.isclass(it := getattr(room, name))}


def written(cls: type, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The class and its arguments as a user writes them in YAML; unnamed options stand beside ``init_args``."""
    spec = by_path(cls, **{key: value for key, value in sample.items() if key != "dict_kwargs"})
    return spec | ({"dict_kwargs": sample["dict_kwargs"]} if "dict_kwargs" in sample else {})


def parser_of(type_: Any, parser_class: type = jsonargparse.ArgumentParser) -> Any:
    parser = parser_class(exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_argument("--it", type=type_)
    return parser


def built(text: str, type_: Any, folder: Path) -> tuple[Any, str]:
    """The object of a YAML text, and what ``--print_config`` shows of it."""
    parser, file = parser_of(type_), folder / "config.yaml"
    file.write_text(text)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parser.parse_args([f"--config={file}", "--print_config"])
    torch.manual_seed(0)  # the user's own modules draw their weights
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the old name
    return instantiate(parser.parse_args([f"--config={file}"])).it, printed.getvalue()


def in_python(spec: Any) -> Any:
    """The object of the same arguments without jsonargparse."""
    if isinstance(spec, Mapping) and "class_path" in spec:
        path, _, name = spec["class_path"].rpartition(".")
        arguments = {key: in_python(value) for key, value in spec.get("init_args", {}).items()}
        cls = getattr(importlib.import_module(path), name)
        for key, typed in TYPED.items():
            if isinstance(arguments.get(key), dict):
                arguments[key] = typed(**arguments[key])
        return cls(**arguments, **spec.get("dict_kwargs", {}))
    if isinstance(spec, list):
        return [in_python(each) for each in spec]
    return pkgutil.resolve_name(spec) if is_function(spec) else spec


def is_function(spec: Any) -> bool:
    """Whether a value of a sample is the import path of a function."""
    return isinstance(spec, str) and spec.startswith(("support.", "torch.nn.functional."))


TYPED = {
    "threat": ThreatModel,
    "execution": Execution,
    "critic": CriticDiscrepancy,
    "perturb": Perturb,
    "reweighting": SampleReweighting,
}
"""Arguments whose class jsonargparse knows from the type hint, so that their fields alone will do in YAML."""


def for_hydra(spec: Any, name: str = "") -> Any:
    """The same object as Hydra names it."""
    if is_function(spec):
        return {"_target_": "hydra.utils.get_method", "path": spec}
    if isinstance(spec, list):
        return [for_hydra(each) for each in spec]
    if not isinstance(spec, Mapping):
        return spec
    if "class_path" not in spec and name in TYPED:
        spec = by_path(TYPED[name], **spec)
    if "class_path" not in spec:
        return {key: for_hydra(value) for key, value in spec.items()}
    arguments = spec.get("init_args", {}) | spec.get("dict_kwargs", {})
    # TorchAttack has an argument of this name, and instantiate() has it too.
    return {"_target_": spec["class_path"]} | {key: for_hydra(value, key) for key, value in arguments.items()}


def configuration(it: Any, seen: tuple[int, ...] = ()) -> Any:
    """All that an object holds, private attributes too, as plain values that can be compared."""
    if it is None or isinstance(it, (str, bytes, bool, int, float, type, torch.dtype, torch.device)):
        return it
    if isinstance(it, (FunctionType, ModuleType)) or inspect.isbuiltin(it):
        return it.__name__, getattr(it, "__qualname__", "")  # torchmetrics wraps functions anew for each object
    if isinstance(it, Tensor):
        return ("tensor", str(it.dtype), it.requires_grad, it.detach().tolist())
    if id(it) in seen:
        return "a circle"
    seen = (*seen, id(it))
    if isinstance(it, Mapping):
        return {key: configuration(value, seen) for key, value in it.items()}
    if isinstance(it, (list, tuple, set, frozenset)):
        return (
            type(it)(configuration(each, seen) for each in it) if type(it) in (list, tuple) else sorted(map(repr, it))
        )
    if inspect.ismethod(it):
        return (it.__func__, configuration(it.__self__, seen))
    state = getattr(it, "__dict__", {})
    return type(it).__name__, {key: configuration(value, seen) for key, value in state.items()}


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where two configurations differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif one != other or (type(one) is not type(other) and not {type(one), type(other)} <= {int, float}):
        yield f"{path}: {one!r} and {other!r}"


BY_NAME = {cls.__name__: cls for cls in SAMPLES}
each_class = pytest.mark.parametrize("cls", [pytest.param(cls, id=name) for name, cls in BY_NAME.items()])


def base_of(cls: type) -> type:
    """The class that LightningCLI, or an argument of this package, asks for."""
    return next((base for base in (Callback, Attack, Detector, nn.Module) if issubclass(cls, base)), cls)


@each_class
def test_a_class_survives_a_round_trip(cls, tmp_path):
    spec = written(cls, SAMPLES[cls])
    first, printed = built(yaml.safe_dump({"it": spec}), base_of(cls), tmp_path)
    second, again = built(printed, base_of(cls), tmp_path)
    assert type(first) is type(second) is cls
    assert list(differences(configuration(first), configuration(second))) == []
    assert printed == again
    torch.manual_seed(0)
    assert list(differences(configuration(first), configuration(in_python(spec)))) == []


@each_class
def test_every_argument_has_a_type_that_is_checked(cls):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", fail_untyped=True)
    assert not [action.dest for action in parser._actions if "Unvalidated" in str(getattr(action, "_typehint", ""))]


@each_class
def test_every_argument_that_does_not_show_its_type_has_a_sample(cls):
    parameters = inspect.signature(cls).parameters.values()
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    plain = {
        each.name
        for each in named
        if isinstance(each.default, (bool, int, float, str)) and "|" not in str(each.annotation)
    }
    assert {each.name for each in named} - plain <= SAMPLES[cls].keys()


def test_every_public_class_has_a_sample_or_a_reason():
    assert SAMPLES.keys() | EXCLUDED.keys() == public_classes()
    assert not SAMPLES.keys() & EXCLUDED.keys()
    assert all(inspect.isabstract(cls) for cls, reason in EXCLUDED.items() if reason == ABSTRACT)
    assert all(issubclass(cls, tuple) for cls, reason in EXCLUDED.items() if reason == RESULT)


def test_the_changes_of_a_named_recipe_are_its_fields():
    hints, changes = get_type_hints(Recipe), get_type_hints(RecipeChanges)
    assert changes == {name: hint for name, hint in hints.items() if name != "name"}


def defended(tmp_path: Path, **arguments: Any) -> WassersteinDefense:
    """The callback, built from YAML, and built once more from what was printed."""
    text = yaml.safe_dump({"it": by_path("lightning_wdefense.WassersteinDefense", **arguments)})
    first, printed = built(text, Callback, tmp_path)
    second, _ = built(printed, Callback, tmp_path)
    assert list(differences(configuration(first), configuration(second))) == []
    return first


FIRST = {"eps": 0.1}
THREE_STEPS = by_path("lightning_wdefense.attacks.PGD", threat=FIRST, steps=3)


def test_a_recipe_by_name_with_changes(tmp_path):
    recipe = defended(tmp_path, recipe="trades", weight=3, threat=FIRST).recipe
    assert recipe == Recipe.named("trades", ThreatModel(eps=0.1), weight=3.0)


def test_a_recipe_by_name_with_changes_of_any_field(tmp_path):
    changes = {
        "attack": THREE_STEPS,
        "execution": {"precision": "bf16"},
        "task_loss": "torch.nn.functional.mse_loss",
        "awp": 0.01,
    }
    recipe = defended(
        tmp_path, recipe=by_path("lightning_wdefense.Recipe.named", name="trades", threat=FIRST, **changes)
    ).recipe
    threat = ThreatModel(eps=0.1)
    python = {"execution": Execution("bf16"), "task_loss": torch.nn.functional.mse_loss, "awp": 0.01}
    assert recipe == Recipe.named("trades", threat, attack=PGD(threat, 3), **python)


@pytest.mark.parametrize("by", ["fields", "class_path"])
def test_a_whole_recipe(tmp_path, by):
    fields = {"attack": THREE_STEPS, "discrepancy": "sinkhorn", "weight": 0.3, "features": "penultimate"}
    recipe = defended(
        tmp_path, recipe=fields if by == "fields" else by_path("lightning_wdefense.Recipe", **fields)
    ).recipe
    attack = PGD(ThreatModel(eps=0.1), steps=3)
    assert recipe == Recipe(attack, discrepancy="sinkhorn", weight=0.3, features="penultimate")


@pytest.mark.parametrize(
    ("discrepancy", "expected"),
    [
        ("kl", "kl"),
        ("lightning_wdefense.defenses.coral", "lightning_wdefense.defenses.coral"),
        (by_path(ClassTransport, relative_blur=0.3), ClassTransport(0.3)),
        (by_path(CriticDiscrepancy, depth=3), CriticDiscrepancy(depth=3)),
        ({"depth": 3}, CriticDiscrepancy(depth=3)),
        (by_path("support.configurations.Shift", scale=2.0), Shift(2.0)),
    ],
)
def test_any_discrepancy_in_a_recipe(tmp_path, discrepancy, expected):
    recipe = defended(tmp_path, recipe={"attack": THREE_STEPS, "discrepancy": discrepancy, "weight": 0.3}).recipe
    assert recipe.discrepancy == expected


def test_an_imported_discrepancy_is_the_function():
    assert get_discrepancy("lightning_wdefense.defenses.coral") is coral
    for wrong, says in (
        ("lightning_wdefense.defenses.corral", "has no attribute 'corral'"),
        ("no_such_package.coral", "No module named"),
        ("lightning_wdefense.defenses.ClassTransport", "not a function"),
        ("lightning_wdefense.__version__", "not a function"),
    ):
        with pytest.raises(ValueError, match=says):
            get_discrepancy(wrong)


@pytest.mark.parametrize("written_as", ["fields", "class_path"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eps": 0.1}, ThreatModel(eps=0.1)),
        ({"eps": 0.1, "bounds": [0, 255]}, ThreatModel(eps=0.1, bounds=(0, 255))),
        ({"eps": 0.1, "bounds": None}, ThreatModel(eps=0.1, bounds=None)),
        ({"eps": 1, "norm": "l2", "mean": 0.5, "std": [0.1, 0.2]}, ThreatModel("l2", 1.0, mean=0.5, std=(0.1, 0.2))),
    ],
)
def test_a_threat_model(tmp_path, fields, expected, written_as):
    threat = fields if written_as == "fields" else by_path("lightning_wdefense.ThreatModel", **fields)
    assert defended(tmp_path, recipe="pgd-at", threat=threat).recipe.threat == expected


def test_attacks_under_names_of_ones_own(tmp_path):
    attacks = {"mine": THREE_STEPS, "other": "fgsm"}
    text = yaml.safe_dump({"it": by_path("lightning_wdefense.RobustnessMonitor", threat=FIRST, attacks=attacks)})
    monitor, _ = built(text, Callback, tmp_path)
    threat = ThreatModel(eps=0.1)
    assert monitor.attacks == {"mine": PGD(threat, 3), "other": FGSM(threat)}


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ("x", [0]),  # a key
        ("pair.1", [2]),  # a path
        (["x", "pair.1"], [0, 2]),  # several
        (["x", ["pair", 1]], [0, 2]),
        (by_path("support.configurations.FirstOfPair"), [1]),  # a callable
    ],
)
def test_a_list_of_inputs_is_several_inputs_as_in_python(tmp_path, inputs, found):
    text = yaml.safe_dump({"it": by_path("lightning_wdefense.RobustnessMonitor", threat=FIRST, inputs=inputs)})
    monitor, _ = built(text, Callback, tmp_path)
    tensors = [torch.full((2, 3), float(value)) for value in range(3)]
    batch = {"x": tensors[0], "pair": (tensors[1], tensors[2])}
    assert [int(each[0, 0]) for each in monitor._target.batches.inputs(batch)] == found


MISSPELT = {
    "callback": (by_path("lightning_wdefense.WassersteinDefense", threat=FIRST, warmup_epoch=2), "warmup_epoch", "warmup_epochs"),
    "threat": (by_path("lightning_wdefense.WassersteinDefense", threat={"esp": 0.1}), "esp", "eps"),
    "attack": (
        by_path("lightning_wdefense.RobustnessMonitor", threat=FIRST, attacks=[by_path(PGD, threat=FIRST, stepps=3)]),
        "stepps",
        "steps",
    ),
    "recipe": (
        by_path("lightning_wdefense.WassersteinDefense", recipe={"attack": THREE_STEPS, "wieght": 1, "discrepancy": "kl"}),
        "wieght",
        "weight",
    ),
    "change": (
        by_path("lightning_wdefense.WassersteinDefense", recipe=by_path("lightning_wdefense.Recipe.named", name="sat", threat=FIRST, apw=1)),
        "apw",
        "awp",
    ),
    "class": (by_path("lightning_wdefense.WasersteinDefense", threat=FIRST), "WasersteinDefense", "WassersteinDefense"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_key_is_answered_with_the_nearest(case):
    spec, wrong, right = MISSPELT[case]
    with pytest.raises(jsonargparse.ArgumentError, match=wrong):  # also without this package's parser
        parser_of(Callback).parse_object({"it": spec})
    with pytest.raises(jsonargparse.ArgumentError) as caught:
        parser_of(Callback, SuggestingParser).parse_object({"it": spec})
    last = str(caught.value).splitlines()[-1]
    assert re.search(f"'{wrong}'. Did you mean '{right}'", last), last


def test_a_class_that_cannot_be_read_hides_no_message():
    with pytest.raises(jsonargparse.ArgumentError, match="no_such_package"):
        SuggestingParser(exit_on_error=False).error("class_path 'no_such_package.Thing':\n Option 'x' is not accepted")


def test_arguments_of_a_function_are_suggested():
    message = "class_path 'support.configurations.small_critic':\n Option 'shpe' is not accepted"
    assert suggestions(message) == [
        "There is no argument of small_critic 'shpe'. Did you mean 'shape'? Known: 'shape'."
    ]


def test_a_key_like_no_other_gets_no_suggestion():
    spec = by_path("lightning_wdefense.WassersteinDefense", threat={"xyzzy": 0.1})
    with pytest.raises(jsonargparse.ArgumentError, match="'xyzzy' is not accepted") as caught:
        parser_of(Callback, SuggestingParser).parse_object({"it": spec})
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (by_path("lightning_wdefense.WassersteinDefense", recipe="traides", threat=FIRST), "recipe 'traides'. Did you mean 'trades'"),
        (by_path("lightning_wdefense.RobustnessMonitor", threat=FIRST, attacks=["pdg"]), "attack 'pdg'. Did you mean 'pgd'"),
        (by_path("lightning_wdefense.DetectionMonitor", threat=FIRST, detectors=["enrgy"]), "detector 'enrgy'. Did you mean 'energy'"),
    ],
)  # fmt: skip
def test_a_misspelt_name_is_answered_with_the_nearest(spec, says, tmp_path):
    with pytest.raises(Exception, match=re.escape(says)):
        built(yaml.safe_dump({"it": spec}), Callback, tmp_path)


@pytest.mark.parametrize("convert", [None, "all"])
@each_class
def test_hydra_builds_a_class(cls, convert):
    hydra = pytest.importorskip("hydra.utils")
    from omegaconf import OmegaConf

    if convert is None and cls in (RobustnessMonitor, RobustnessAudit):
        pytest.skip(
            "OmegaConf takes an attack in a list for a dataclass to read, and refuses its types: needs _convert_"
        )
    spec = written(cls, SAMPLES[cls])
    config = OmegaConf.create(for_hydra(spec) | ({} if convert is None else {"_convert_": convert}))
    torch.manual_seed(0)
    it = hydra.instantiate(config)
    torch.manual_seed(0)
    assert list(differences(configuration(it), configuration(in_python(spec)))) == []


PAGE = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_page_shows_yaml_that_is_built(block, tmp_path):
    spec = yaml.safe_load(block)
    recipe = defended(tmp_path, **spec["init_args"]).recipe
    given = spec["init_args"]["recipe"]
    if given == "trades":
        assert recipe == Recipe.named("trades", ThreatModel(eps=0.2), weight=3.0)
    elif "class_path" in given:
        attack = PGD(ThreatModel(eps=0.2), steps=7, loss="kl", random_start="gaussian")
        assert recipe == Recipe.named("trades", ThreatModel(eps=0.2), awp=0.005, attack=attack)
    else:
        assert (recipe.attack.steps, recipe.discrepancy.options.relative_blur, recipe.execution) == (
            7,
            0.5,
            Execution("bf16"),
        )


@pytest.mark.parametrize("example", ["cli", "hydra"])
def test_the_page_shows_the_commands_of_the_examples(example):
    code = (Path(__file__).parents[1] / "examples" / example / "train.py").read_text()
    shown = re.findall(rf"^python examples/{example}.*(?:\n    --.*)*", PAGE, re.M)
    assert len(shown) > 3
    assert all(command in code for command in shown)


def test_a_callback_under_a_name_of_its_own():
    from lightning.pytorch.demos.boring_classes import BoringModel

    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    arguments = ["--defense.recipe", "trades", "--defense.threat.eps", "0.1", "--trainer.logger", "false"]
    cli = names["CLI"](BoringModel, run=False, args=arguments)
    (defense,) = (each for each in cli.trainer.callbacks if isinstance(each, WassersteinDefense))
    assert defense.recipe == Recipe.named("trades", ThreatModel(eps=0.1))


def test_a_callback_appended_on_the_command_line():
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    added = ["--trainer.callbacks+=lightning_wdefense.RobustnessMonitor", "--trainer.callbacks.threat.eps=0.2"]
    arguments = [
        "--trainer.callbacks=lightning_wdefense.WassersteinDefense",
        "--trainer.callbacks.threat.eps=0.1",
        *added,
    ]
    cli = LightningCLI(
        BoringModel, run=False, args=[*arguments, "--trainer.callbacks.attacks=[fgsm]", "--trainer.logger=false"]
    )
    kinds = {type(each): each for each in cli.trainer.callbacks}
    assert kinds[WassersteinDefense].recipe.threat == ThreatModel(eps=0.1)
    assert kinds[RobustnessMonitor].attacks == {"fgsm": FGSM(ThreatModel(eps=0.2))}


@dataclass(frozen=True)
class Brighter(Attack):
    """An attack of a user's, in a file that does not import all names of the base class's annotations."""

    threat: ThreatModel
    seed: int = 0
    name = "brighter"

    def perturb(self, problem):
        return problem.project(problem.data + self.threat.eps)


def test_an_attack_of_ones_own(tmp_path):
    own = by_path("test_yaml.Brighter", threat=FIRST, seed=3)
    sys.modules["test_yaml"] = sys.modules[__name__]
    try:
        text = yaml.safe_dump({"it": by_path("lightning_wdefense.RobustnessMonitor", threat=FIRST, attacks=[own])})
        monitor, _ = built(text, Callback, tmp_path)
    finally:
        del sys.modules["test_yaml"]
    assert monitor.attacks == {"brighter": Brighter(ThreatModel(eps=0.1), seed=3)}


def test_hydra_keeps_lists_that_a_checkpoint_can_hold(tmp_path):
    hydra = pytest.importorskip("hydra.utils")
    from omegaconf import OmegaConf

    threat = {
        "_target_": "lightning_wdefense.ThreatModel",
        "eps": 0.1,
        "bounds": [0, 2],
        "mean": [0.5, 0.4],
        "std": [0.2, 0.1],
    }
    attack = {
        "_target_": "lightning_wdefense.attacks.WassersteinAttack",
        "threat": threat | {"norm": "wasserstein"},
        "methods": ["projected"],
    }
    for config in (threat, attack):
        it = hydra.instantiate(OmegaConf.create(config))
        assert hash(it) == hash(eval(repr(it), vars(importlib.import_module("lightning_wdefense.attacks"))))
        torch.save(it, tmp_path / "it.pt")
        assert torch.load(tmp_path / "it.pt", weights_only=True) == it


def test_hydra_says_what_a_threat_model_without_a_target_lacks():
    hydra = pytest.importorskip("hydra.utils")
    from omegaconf import OmegaConf

    config = OmegaConf.create({"_target_": "lightning_wdefense.WassersteinDefense", "threat": {"eps": 0.1}})
    with pytest.raises(Exception, match=r"For Hydra add _target_: lightning_wdefense\.ThreatModel"):
        hydra.instantiate(config)


def test_hydra_refuses_a_misspelt_key():
    hydra = pytest.importorskip("hydra.utils")
    from omegaconf import OmegaConf

    with pytest.raises(Exception, match=r"ThreatModel.*'esp'"):
        hydra.instantiate(OmegaConf.create({"_target_": "lightning_wdefense.ThreatModel", "esp": 0.1}))
