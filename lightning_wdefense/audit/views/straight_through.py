"""A model with the identity as the gradient of operations that have none: rounding, bounds, conversions to integers, `detach`, `no_grad`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_wdefense.audit.views.base import View

STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"}
COMPARISONS = {"gt": 1, "ge": 1, "greater": 1, "greater_equal": 1, "lt": -1, "le": -1, "less": -1, "less_equal": -1}
INTEGERS = {"to", "type", "int", "long", "short", "byte", "char", "type_as"}
BOUNDS = {"clamp": ("min", "max"), "clip": ("min", "max"), "hardtanh": ("min_val", "max_val")}
FLOATS = {"to", "type", "type_as", "float", "double", "half", "bfloat16"}
_SOURCE = "_lightning_wdefense_source"


class StraightThrough(View):
    """Backward pass differentiable approximation (BPDA), without a change of the model.

    The forward pass is the model's own. In the backward pass the operations of :data:`STEPS`, conversions to integers, comparisons that
    become numbers, ``detach``, ``.data`` and ``torch.no_grad`` are passed as if they were the identity; so are :data:`BOUNDS`, for values at a
    bound, where recent versions of PyTorch have a gradient of zero. What leaves PyTorch (NumPy, PIL) cannot be passed.

    Args:
        inner: the model, as a view.

    Attributes:
        met: names of the operations without gradient that the model ran.

    References:
        Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", 2018.
    """

    def __init__(self, inner: View) -> None:
        super().__init__(inner)
        self.met: set[str] = set()
        self._integers = True

    def __call__(self, inputs: Tensor) -> Tensor:
        """The logits ``(N, K)``."""
        if not torch.is_grad_enabled():
            return self.inner(inputs)  # type: ignore[no-any-return]
        if self._integers:
            try:
                return self._run(inputs)
            except Exception:  # whatever the model does with its integers, such as indexing, cannot be done with floats
                self._integers = False
        return self._run(inputs)

    def _run(self, inputs: Tensor) -> Tensor:
        with _Mode(self.met, integers=self._integers):
            return self.inner(inputs)  # type: ignore[no-any-return]


class _Mode(TorchFunctionMode):
    def __init__(self, met: set[str], *, integers: bool) -> None:
        super().__init__()
        self._met, self._integers = met, integers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0]
        if name in ("_set_grad_enabled", "set_grad_enabled"):
            if args and args[0] is False:
                self._met.add("no_grad")
                return None
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return func(*args, **kwargs)
        if first.requires_grad:
            if name in ("detach", "detach_") or func == Tensor.data.__get__:  # type: ignore[attr-defined]
                self._met.add("detach")
                return first
            if name == "numpy":
                return func(first.detach(), *args[1:], **kwargs)
            if name.rstrip("_") in STEPS:
                self._met.add(name.rstrip("_"))
                return self._step(getattr(torch, name.rstrip("_")), first, args, kwargs, in_place=name.endswith("_"))
            if name.rstrip("_") in BOUNDS:
                return self._bounded(func, name.rstrip("_"), first, args, kwargs, in_place=name.endswith("_"))
        return self._converted(func, name, first, args, kwargs)

    def _bounded(self, func: Any, name: str, values: Tensor, args: Any, kwargs: Any, *, in_place: bool) -> Any:
        low, high = (kwargs.get(key, each) for key, each in zip(BOUNDS[name], (*args[1:3], None, None), strict=False))
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not bool(((values == low) | (values == high)).any()):
            return func(*args, **kwargs)
        self._met.add(name)
        bounded = func(values.detach().clone(), *args[1:], **kwargs)
        found = _passed(values.where((values >= low) & (values <= high), bounded), bounded)
        return values.copy_(found.clone()) if in_place or kwargs.get("inplace") else found

    def _step(
        self, function: Callable[..., Tensor], values: Tensor, args: Any, kwargs: Any, *, in_place: bool
    ) -> Tensor:
        stepped = function(values.detach(), *args[1:], **{key: each for key, each in kwargs.items() if key != "out"})
        found = _passed(values, stepped)
        return values.copy_(found.clone()) if in_place else found

    def _converted(self, func: Any, name: str, first: Tensor, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor):
            return found
        if name.strip("_") in COMPARISONS:
            other = args[1] if len(args) > 1 else kwargs.get("other")
            if first.requires_grad or getattr(other, "requires_grad", False):
                setattr(found, _SOURCE, COMPARISONS[name.strip("_")] * (first - other))
        elif name in INTEGERS and first.requires_grad and not _is_float(found) and found.dtype != torch.bool:
            if self._integers:
                self._met.add(str(found.dtype).split(".")[1])
                return _passed(first, found.to(first.dtype))
        elif name in FLOATS and _is_float(found) and hasattr(first, _SOURCE):
            self._met.add("comparison")
            return _passed(getattr(first, _SOURCE).to(found.dtype), found)
        return found


def _passed(values: Tensor, stepped: Tensor) -> Tensor:
    """``stepped``, with the gradient of ``values``."""
    return _Identity.apply(values, stepped)  # type: ignore[no-any-return]


def _is_float(values: Tensor) -> bool:
    return values.is_floating_point()


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, stepped: Tensor) -> Tensor:  # type: ignore[override]
        return stepped.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
