"""Every public class survives a round trip through YAML: written, read, built, printed, read and built again."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from support.configurations import mean_of_features, per_sample_loss, squared_cost
from torch import Tensor, nn

import lightning_wdefense
from lightning_wdefense import (
    AdversarialExampleLogger,
    DetectionMonitor,
    Recipe,
    RobustnessMonitor,
    ThreatModel,
    WassersteinDefense,
)
from lightning_wdefense.attacks import (
    FGSM,
    PGD,
    Attack,
    AutoAttack,
    Execution,
    FeatureScattering,
    GibbsNoise,
    LagrangianAttack,
    LearnedAttack,
    Perturb,
    SinkhornAttack,
    SoftBallPGD,
    TorchAttack,
    WassersteinAttack,
    WorstCase,
)
from lightning_wdefense.defenses import (
    Certificate,
    ClassTransport,
    CriticDiscrepancy,
    PurifiedClassifier,
    ResidualGenerator,
    SlicedTransport,
    Transport,
    WassersteinPurifier,
    WassersteinSmoothing,
)
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
from lightning_wdefense.metrics import (
    AUROC,
    AccuracyCurve,
    AttackSuccessRate,
    Detectability,
    RobustAccuracy,
    RobustAccuracyCurve,
    TransportShift,
)
from lightning_wdefense.mixin import DefenseOutput, WassersteinDefenseMixin
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


def by_path(cls: type | str, **arguments: Any) -> dict[str, Any]:
    """An object as YAML names it."""
    path = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
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
    LagrangianAttack: {"threat": THREAT, "gamma": 0.7, "step_size": 0.1, "loss": "margin"},
    FeatureScattering: {"threat": THREAT, "step_size": 0.1, "divergence": by_path(SinkhornDivergence, blur=0.3)},
    GibbsNoise: {"threat": THREAT, "spread": 0.2, "loss": LOSS, "copies": 3},
    SinkhornAttack: {"threat": THREAT, "step_size": 0.1, "loss": LOSS, "divergence": by_path(SinkhornDivergence)},
    WassersteinAttack: {"threat": PIXELS, "methods": ["projected"], "loss": "ce", "neighbourhood": 3},
    AutoAttack: {"threat": {"eps": 0.1}, "steps": 20},
    TorchAttack: {"attack": "PGD", "threat": {"eps": 0.1}, "seed": 3, "dict_kwargs": {"steps": 4, "alpha": 0.02}},
    WassersteinDefense: {
        "recipe": "trades", "threat": UNBOUNDED, "weight": 3, "features": "penultimate", "warmup_epochs": 1.5, "through": "auto",
        "perturb": {"path": "embedding", "padding": 0}, "model": "net", **PLACES, "ignore_index": 255, "name": "second",
    },
    RobustnessMonitor: {
        "threat": THREAT, "attacks": ["fgsm", ATTACK], "max_batches": 2, "epsilons": [0.1, 0.5], "features": None, "through": "auto",
        "perturb": {"path": "embedding", "by": "token"}, "model": "net", **PLACES, "dataloaders": [0, 2], "ignore_index": 255,
        "name": "second",
    },
    AdversarialExampleLogger: {
        "threat": THREAT, "attack": ATTACK, "class_names": ["cat", "dog"], "through": "step", "model": "net", **PLACES,
    },
    DetectionMonitor: {
        "threat": THREAT, "attack": ATTACK, "detectors": ["energy", by_path(KNNDistance, k=3)], "features": "net.head", "max_batches": 2,
        "through": "step", "perturb": "embedding", "model": "net", **PLACES, "dataloaders": [1], "name": "second",
    },
    Recipe: {
        "attack": by_path(PGD, threat=UNBOUNDED, steps=3, loss=LOSS), "sees": "clean", "discrepancy": by_path(SlicedWasserstein, p=1),
        "weight": 0.3, "task_loss": "torch.nn.functional.mse_loss", "execution": {"precision": "bf16"}, "ramp_steps": True,
    },
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
    LearnedAttack: ABSTRACT,
    Detector: ABSTRACT,
    WassersteinDefenseMixin: "a base class without arguments, for a module of the user's own",
    SinkhornConvergenceWarning: "a warning",
    **dict.fromkeys(
        (
            DefenseOutput,
            WorstCase,
            Certificate,
            TwoSampleResult,
            AUROC,
            AccuracyCurve,
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


def built(text: str, type_: Any) -> tuple[Any, str]:
    """The object of a YAML text, and the text as ``--print_config`` shows it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=type_)
    configuration = parser.parse_string(text)
    # As --print_config does it. Left out, a null would become the default: bounds=(0, 1) for unbounded data.
    printed = parser.dump(configuration, skip_none=False)
    torch.manual_seed(0)  # the user's own modules draw their weights
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
    return instantiate(configuration).it, printed


def in_python(spec: Any) -> Any:
    """The object of the same arguments without jsonargparse."""
    if isinstance(spec, Mapping) and "class_path" in spec:
        path, _, name = spec["class_path"].rpartition(".")
        arguments = {key: in_python(value) for key, value in spec.get("init_args", {}).items()}
        cls = getattr(importlib.import_module(path), name)
        for key, typed in (("threat", ThreatModel), ("execution", Execution), ("critic", CriticDiscrepancy), ("perturb", Perturb)):
            if isinstance(arguments.get(key), dict):
                arguments[key] = typed(**arguments[key])
        return cls(**arguments, **spec.get("dict_kwargs", {}))
    if isinstance(spec, list):
        return [in_python(each) for each in spec]
    functions = (per_sample_loss, squared_cost, mean_of_features)
    return {f"{it.__module__}.{it.__name__}": it for it in functions}.get(spec, spec) if isinstance(spec, str) else spec


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
        return type(it)(configuration(each, seen) for each in it) if type(it) in (list, tuple) else sorted(map(repr, it))
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
    elif type(one) is not type(other) or one != other:
        yield f"{path}: {one!r} and {other!r}"


@pytest.mark.parametrize("cls", SAMPLES, ids=lambda cls: cls.__name__)
def test_a_class_survives_a_round_trip(cls):
    text = yaml.safe_dump({"it": written(cls, SAMPLES[cls])})
    # Lightning's and PyTorch's classes are found under the base that LightningCLI asks for.
    base = next((each for each in (Callback, Attack, Detector, nn.Module) if issubclass(cls, each)), cls)
    first, printed = built(text, base)
    second, again = built(printed, base)
    assert type(first) is type(second) is cls
    assert list(differences(configuration(first), configuration(second))) == []
    assert printed == again


