"""Any attack of the torchattacks library, made safe to run inside somebody else's training."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_wdefense._dtype import default_dtype
from lightning_wdefense._names import unknown_name
from lightning_wdefense._seeding import locked_random_state
from lightning_wdefense.attacks.base import Attack, Problem
from lightning_wdefense.attacks.labels import class_labels, hard_labels
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.modules.outputs import logits_of
from lightning_wdefense.modules.state.isolation import eager

MIN_CLASSES = {"APGDT": 4, "AutoAttack": 4}
"""The targeted DLR loss looks at the four largest logits."""

_NORMS = {"linf": "Linf", "l2": "L2"}


class TorchAttack(Attack):
    """An attack of `torchattacks <https://github.com/Harry24k/adversarial-attacks-pytorch>`_, run safely.

    It keeps every promise of :class:`~lightning_wdefense.attacks.Attack`: works in data units whatever the model sees, on inputs
    of any shape (others than images are laid out as ``(N, C, H, W)``), under ``inference_mode``, without touching modes,
    gradients or the global random state. The result is projected into the threat's ball, so attacks without a radius of
    their own (CW, DeepFool) count only where they end inside it.

    ``TorchAttack("AutoAttack", ...)`` is torchattacks' preset, which runs 10 steps where the published standard runs 100:
    use ``"autoattack"`` (:class:`~lightning_wdefense.attacks.AutoAttack`) for numbers that others can compare.

    Args:
        attack: name of the class in torchattacks, such as ``"PGD"``, ``"APGD"`` or ``"Square"``.
        threat: what the attacker may do; ``eps``, ``norm`` and the bounds are passed on, rescaled to [0, 1].
        seed: seeds all of the attack's randomness in calls that are given no generator.
        **options: for the attack's constructor, in torchattacks' own units (lengths on the [0, 1] scale).

    Raises:
        ImportError: if torchattacks is not installed.
        ValueError: if the attack or an option does not exist, or the threat has no bounds or a norm it cannot take.
    """

    def __init__(self, attack: str, threat: ThreatModel, *, seed: int = 0, **options: Any) -> None:
        check_threat(threat, type(self).__name__)
        known = _attack_classes()
        if attack not in known:
            raise ValueError(unknown_name("torchattacks attack", attack, known))
        _require_bounds(attack, threat)
        _ = threat.ball
        accepted = inspect.signature(known[attack]).parameters
        for option in options:
            if option not in accepted or option in ("model", "eps", "norm"):
                given = " It is taken from the threat model." if option in ("eps", "norm") else ""
                free = [name for name in accepted if name not in ("model", "eps", "norm")]
                raise ValueError(unknown_name(f"option of {attack}", option, free) + given)
        if "eps" in accepted and "norm" not in accepted and attack.endswith("L2") != (threat.norm == "l2"):
            raise ValueError(
                f"torchattacks' {attack} cannot attack in norm {threat.norm!r}: use PGD or PGDL2 to match."
            )
        self.attack, self.threat, self.seed, self.options = attack, threat, seed, options
        self._name = attack.lower()

    @property
    def name(self) -> str:  # type: ignore[override]
        """The attack's name in lower case; for AutoAttack's parts their own."""
        return self._name

    def with_eps(self, eps: float) -> TorchAttack:
        """The same attack at another radius (data units); an explicit step size keeps its ratio to the radius."""
        scaled = copy.copy(self)
        scaled.threat = self.threat.with_eps(eps)
        if "alpha" in self.options:
            scaled.options = self.options | {"alpha": self.options["alpha"] * self.threat.ratio_to(eps)}
        return scaled

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        with locked_random_state():  # from which torchattacks draws
            view = UnitImages(problem)
            attack = self._build(view.model, view.classes, seed_globally(problem.generator))
            with default_dtype(torch.float32):  # torchattacks counts on it; Lightning's "true" precisions change it
                adversarial = attack(view.images, view.labels)
            return problem.project(view.to_data(adversarial))

    def _build(self, model: nn.Module, classes: int, seed: int) -> Any:
        needed = 3 if self.options.get("loss") == "dlr" else MIN_CLASSES.get(self.attack, 2)
        if classes < needed:
            raise ValueError(
                f"torchattacks' {self.attack} needs at least {needed} classes, this model has {classes}: use "
                '"autoattack", which leaves that part out.'
            )
        cls = _attack_classes()[self.attack]
        low, high = self.threat.bounds or (0.0, 1.0)
        given = {
            "eps": self.threat.eps / (high - low),
            "norm": _NORMS[self.threat.norm],
            "n_classes": min(classes, 10),
            "seed": seed,
        }
        accepted = inspect.signature(cls).parameters
        return cls(model, **{key: value for key, value in given.items() if key in accepted} | self.options)

    def __repr__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"TorchAttack({self.attack!r}, {self.threat!r}, seed={self.seed}{options})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchAttack) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.attack, self.threat, self.seed, repr(self.options)))


class UnitImages:
    """A problem as torchattacks wants it: images ``(N, C, H, W)`` in [0, 1], hard labels, a module returning logits.

    Inputs that are not images, or are too small or oblong for the Square attack's windows, are laid out on a square
    grid with cells to spare; what an attack does to the spare cells does not reach the model.
    """

    def __init__(self, problem: Problem) -> None:
        low, high = problem.threat.bounds or (0.0, 1.0)
        self._low, self._range, self._problem = low, high - low, problem
        self._default_dtype = torch.get_default_dtype()
        shape = problem.data.shape
        self._grid: tuple[int, int] | None = None
        if len(shape) != 4 or not _square_fits(*shape[2:], l2=problem.threat.norm == "l2"):
            channels = shape[1] if len(shape) == 4 else 1
            side = math.isqrt(max(shape[1:].numel() // channels, 25) - 1) + 1
            self._grid = (channels, side)
        # float32 and contiguous: FAB and Square fail on other dtypes and strides.
        self.images = self._to_grid(((problem.data - low) / self._range).clamp(0, 1).float().contiguous())
        outputs = problem.checked_outputs("ce")
        logits = logits_of(outputs)
        if logits.ndim != 2:
            raise ValueError(f"torchattacks needs one label a sample; this model's outputs are {tuple(logits.shape)}.")
        self.classes = logits.shape[1]
        self.labels = hard_labels(class_labels(problem.labels, outputs))
        self.model = _LogitsModule(self._logits, problem)

    def to_data(self, images: Tensor) -> Tensor:
        """Unit images back to data units and to the inputs' own shape."""
        return self._from_grid(images).to(self._problem.data.dtype) * self._range + self._low

    def _logits(self, images: Tensor) -> Tensor:
        with default_dtype(self._default_dtype):
            return logits_of(self._problem.forward(self.to_data(images))).float()

    def _to_grid(self, data: Tensor) -> Tensor:
        if self._grid is None:
            return data
        channels, side = self._grid
        flat = data.reshape(len(data), channels, -1)
        return F.pad(flat, (0, side * side - flat.shape[2])).reshape(len(data), channels, side, side)

    def _from_grid(self, images: Tensor) -> Tensor:
        if self._grid is None:
            return images
        shape = self._problem.data.shape[1:]
        cells = shape.numel() // self._grid[0]
        return images.flatten(2)[:, :, :cells].reshape(len(images), *shape)


def _square_fits(height: int, width: int, *, l2: bool) -> bool:
    """Whether the windows of the Square attack (at most 0.8 of the area, odd in L2) fit into the image."""
    window = max(round(math.sqrt(0.8 * height * width)), 3 if l2 else 1)
    window += l2 and window % 2 == 0
    return window <= min(height, width) and (not l2 or min(height, width) >= 5)


class _LogitsModule(nn.Module):
    """Shows torchattacks a module without showing it the user's: no mode to change, no parameter to find."""

    def __init__(self, logits: Callable[[Tensor], Tensor], problem: Problem) -> None:
        super().__init__()
        self._logits, self._problem = logits, problem
        self.device_marker = nn.Parameter(torch.empty(0, device=problem.data.device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return _InputGradientOnly.apply(images, self._logits, self._problem)


class _InputGradientOnly(torch.autograd.Function):
    """Differentiates with respect to the images alone.

    Some attacks call ``backward()``, which would add to the parameters' ``.grad`` and fire DDP's hooks.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, logits: Callable[[Tensor], Tensor], problem: Problem) -> Tensor:  # type: ignore[override]
        if not images.requires_grad:  # black-box queries
            return logits(images).clone()
        with torch.enable_grad(), eager():
            point = images.detach().requires_grad_()
            outputs = logits(point)
        ctx.graph = (outputs, point)
        ctx.problem = problem
        return outputs.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        # FAB walks the graph once for each class, so it is kept (and was made eagerly).
        return ctx.problem.differentiate(*ctx.graph, gradient, keep_graph=True).contiguous(), None, None


def seed_globally(generator: torch.Generator) -> int:
    """Seed the global random states, which the caller's isolation keeps, from a generator; returns the seed."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return seed


def _require_bounds(attack: str, threat: ThreatModel) -> None:
    if threat.bounds is None:
        raise ValueError(
            f"{attack} needs a bounded input range, but the threat model has bounds=None: set bounds=(low, high), or use "
            '"pgd", which needs none.'
        )


def _torchattacks() -> ModuleType:
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(
            'This attack needs torchattacks: pip install "lightning-wdefense[torchattacks]". "pgd" and "fgsm" need nothing.'
        ) from error
    return torchattacks


def _attack_classes() -> dict[str, Any]:
    module = _torchattacks()
    base = module.attack.Attack
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    return {name: cls for name, cls in found.items() if name not in ("Attack", "MultiAttack", "LGV", "VANILA")}
