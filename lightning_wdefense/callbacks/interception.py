"""Intercepts the calls of a module's ``training_step``, and restores the module afterwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lightning_wdefense._compat import LightningModule
from lightning_wdefense.modules.attachments import MISSING, Attachment, exclude_from_copies, restore_getstate

Step = Callable[..., Any]
Interceptor = Callable[..., Any]
"""``interceptor(step, *args, **kwargs)`` calls ``step`` once, and returns its result or a changed result."""


class TrainingStepDispatcher(Attachment):
    """Replaces ``training_step`` on the instance, where accelerators, strategies and tuners all find it.

    There is one dispatcher per module, so interceptors can be added and removed in any order. Removing the last one restores
    the module's ``__dict__``.
    """

    def __init__(self, module: LightningModule) -> None:
        self.host: LightningModule = module
        self._previous = module.__dict__.get("training_step", MISSING)
        self.original: Step = module.training_step
        self._interceptors: list[Interceptor] = []
        functools.update_wrapper(self, self.original, updated=())
        # Lightning looks through __wrapped__ for the user's own signature and code.
        self.__wrapped__ = inspect.unwrap(self.original)
        module.__dict__["training_step"] = self
        exclude_from_copies(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step, through all interceptors."""
        step = self.original
        for interceptor in self._interceptors:
            step = functools.partial(interceptor, step)
        return step(*args, **kwargs)

    def value_in_state(self) -> Any:
        """The ``training_step`` that a copy of the module had in its ``__dict__``."""
        return self._previous

    def value_in_copy(self, host: Any) -> Any:
        """The step of a copy of the module, bound to that copy."""
        return type(host).training_step.__get__(host)

    def remove(self, interceptor: Interceptor) -> None:
        """Remove an interceptor. After the last one, the module is restored."""
        if interceptor in self._interceptors:
            self._interceptors.remove(interceptor)
        # If other code wrapped the step later, this dispatcher stays inside that wrapper and forwards every call.
        if not self._interceptors and self.host.__dict__.get("training_step") is self:
            if self._previous is MISSING:
                del self.host.__dict__["training_step"]
            else:
                self.host.__dict__["training_step"] = self._previous
            restore_getstate(self.host)

    def add(self, interceptor: Interceptor) -> None:
        """Add an interceptor around the existing ones."""
        if interceptor not in self._interceptors:
            self._interceptors.append(interceptor)


def intercept_training_step(module: LightningModule, interceptor: Interceptor) -> Callable[[], None]:
    """Pass every call of ``module.training_step`` through ``interceptor``; returns a function that undoes this."""
    current = module.__dict__.get("training_step")
    dispatcher = current if isinstance(current, TrainingStepDispatcher) else TrainingStepDispatcher(module)
    dispatcher.add(interceptor)
    return functools.partial(dispatcher.remove, interceptor)
