"""Run any attack of the torchattacks library with the promises of :class:`Attack`."""

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
from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.labels import class_labels, hard_labels
from lightning_wdefense.attacks.problem import Problem
from lightning_wdefense.attacks.threat import ThreatModel, check_threat
from lightning_wdefense.modules.outputs import logits_of
from lightning_wdefense.modules.state.isolation import eager

MIN_CLASSES = {"APGDT": 4, "AutoAttack": 4}
"""Smallest number of classes by attack: the targeted DLR loss uses the four largest logits."""

_NORMS = {"linf": "Linf", "l2": "L2"}


class TorchAttack(Attack):
    """An attack of `torchattacks <https://github.com/Harry24k/adversarial-attacks-pytorch>`_.

    It keeps all promises of :class:`~lightning_wdefense.attacks.Attack`: it works in data units and under
    ``inference_mode``, and restores modes, gradients and the global random state. Inputs may have any shape; inputs
    that are not images are laid out as ``(N, C, H, W)``. The result is projected into the threat model's ball. So an
    attack without a perturbation budget (CW, DeepFool) succeeds only if the projected result is misclassified.

    ``TorchAttack("AutoAttack", ...)`` is torchattacks' preset of 10 steps. For numbers that others can compare, use
    ``"autoattack"`` (:class:`~lightning_wdefense.attacks.AutoAttack`), the published standard of 100 steps, which does
    not need torchattacks. So do ``"apgd-ce"``, ``"apgd-t"``, ``"fab-t"`` and ``"square"`` for this class's APGD, APGDT, FAB and Square.

    Args:
        attack: name of the class in torchattacks, such as ``"PGD"``, ``"APGD"`` or ``"Square"``.
        threat: the threat model (norm ``linf`` or ``l2``, with bounds). ``eps``, the norm and the bounds are passed to
            the attack, rescaled to the range [0, 1].
        seed: seeds all noise of calls without a generator.
        **options: arguments of the attack's constructor, in torchattacks' units (lengths for data in [0, 1]).

    Raises:
        ImportError: if torchattacks is not installed.
        ValueError: if the attack or an option is unknown, or the threat model has no bounds or a norm that the attack
            does not support.

    Example:
        >>> import torch
        >>> attack = TorchAttack("PGD", ThreatModel(eps=0.1), steps=5)
        >>> inputs = torch.rand(2, 8)
        >>> adversarial = attack(torch.nn.Linear(8, 3), inputs, torch.tensor([0, 2]))
        >>> bool((adversarial - inputs).abs().max() <= 0.1 + 1e-6)
        True
    """

    runs_in_lockstep = False

    def __init__(self, attack: str, threat: ThreatModel, *, seed: int = 0, **options: Any) -> None:
        check_threat(threat, type(self).__name__)
        known = _attack_classes()
        if attack not in known:
            raise ValueError(unknown_name("torchattacks attack", attack, known))
        _require_bounds(attack, threat)
        _ = threat.ball
        if threat.norm not in _NORMS:
            raise ValueError(
                f"TorchAttack attacks in norm {' or '.join(map(repr, _NORMS))}, not in norm {threat.norm!r}: use PGD."
            )
        accepted = inspect.signature(known[attack]).parameters
        for option in options:
            if option not in accepted or option in ("model", "eps", "norm"):
                given = " Its value is taken from the threat model." if option in ("eps", "norm") else ""
                free = [name for name in accepted if name not in ("model", "eps", "norm")]
                raise ValueError(unknown_name(f"option of {attack}", option, free) + given)
        if "eps" in accepted and "norm" not in accepted and attack.endswith("L2") != (threat.norm == "l2"):
            raise ValueError(
                f"torchattacks' {attack} cannot attack in norm {threat.norm!r}: use PGD for 'linf' and PGDL2 for 'l2'."
            )
        self.attack, self.threat, self.seed, self.options = attack, threat, seed, options

    @property
    def name(self) -> str:  # type: ignore[override]
        """The attack's name in lower case."""
        return self.attack.lower()

    def with_eps(self, eps: float) -> TorchAttack:
        """The same attack with another perturbation budget ``eps`` (data units); a given step size is scaled in proportion."""
        scaled = copy.copy(self)
        scaled.threat = self.threat.with_eps(eps)
        if "alpha" in self.options:
            scaled.options = self.options | {"alpha": self.options["alpha"] * self.threat.ratio_to(eps)}
        return scaled

    def perturb(self, problem: Problem) -> Tensor:
        """The adversarial inputs, in data units."""
        with locked_random_state():  # torchattacks draws from the global random state
            view = UnitImages(problem)
            attack = self._build(view.model, view.classes, seed_globally(problem.generator))
            # torchattacks assumes float32; Lightning's "true" precisions change the default.
            with default_dtype(torch.float32):
                adversarial = attack(view.images, view.labels)
            return problem.project(view.to_data(adversarial))

    def _build(self, model: nn.Module, classes: int, seed: int) -> Any:
        needed = 3 if self.options.get("loss") == "dlr" else MIN_CLASSES.get(self.attack, 2)
        if classes < needed:
            raise ValueError(
                f"torchattacks' {self.attack} needs at least {needed} classes, this model has {classes}: use "
                '"apgd-t" or "autoattack", which need two.'
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
    """A problem in the form that torchattacks expects: images ``(N, C, H, W)`` in [0, 1], hard labels, a module with logits.

    Inputs that are not images, or are too small or too narrow for the windows of the Square attack, are laid out on a
    square grid with padding. Changes of the padding do not reach the model.

    Args:
        problem: the problem.
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
            raise ValueError(
                f"torchattacks needs one label per sample, logits of shape (N, classes); this model's logits have shape {tuple(logits.shape)}: "
                "use another attack, such as PGD."
            )
        self.classes = logits.shape[1]
        self.labels = hard_labels(class_labels(problem.labels, outputs))
        self.model = _LogitsModule(self._logits, problem)

    def to_data(self, images: Tensor) -> Tensor:
        """Images in [0, 1] converted back to data units and to the shape of the inputs."""
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
    """Whether the windows of the Square attack (at most 0.8 of the area; odd side in L2) fit into the image."""
    window = max(round(math.sqrt(0.8 * height * width)), 3 if l2 else 1)
    window += l2 and window % 2 == 0
    return window <= min(height, width) and (not l2 or min(height, width) >= 5)


class _LogitsModule(nn.Module):
    """A module for torchattacks that hides the user's module, so that its modes and parameters cannot be changed."""

    def __init__(self, logits: Callable[[Tensor], Tensor], problem: Problem) -> None:
        super().__init__()
        self._logits, self._problem = logits, problem
        self.device_marker = nn.Parameter(torch.empty(0, device=problem.data.device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return _InputGradientOnly.apply(images, self._logits, self._problem)


class _InputGradientOnly(torch.autograd.Function):
    """Differentiates with respect to the images only.

    Some attacks call ``backward()``, which would otherwise add to the parameters' ``.grad`` and run the hooks of DDP.
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
        # FAB runs a backward pass for each class, so the graph is kept; it was made eagerly, since compiled graphs cannot be kept.
        return ctx.problem.differentiate(*ctx.graph, gradient, keep_graph=True).contiguous(), None, None


def seed_globally(generator: torch.Generator) -> int:
    """Seed the global random states from a generator, and return the seed. The caller restores the states."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return seed


def _require_bounds(attack: str, threat: ThreatModel) -> None:
    if threat.bounds is None:
        raise ValueError(
            f"{attack} needs a bounded input range, but the threat model has bounds=None: set bounds=(low, high), or use "
            '"pgd", which does not need bounds.'
        )


def _torchattacks() -> ModuleType:
    try:
        import torchattacks
    except ImportError as error:
        raise ImportError(
            'This attack needs torchattacks: pip install "lightning-wdefense[torchattacks]". "pgd", "autoattack" and all other names of attacks do not need it.'
        ) from error
    return torchattacks


def _attack_classes() -> dict[str, Any]:
    module = _torchattacks()
    base = module.attack.Attack
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)}
    return {name: cls for name, cls in found.items() if name not in ("Attack", "MultiAttack", "LGV", "VANILA")}
