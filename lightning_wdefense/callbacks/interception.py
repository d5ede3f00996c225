"""Stand between Lightning and a module's ``training_step``, and leave it as it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lightning_wdefense._compat import LightningModule

Step = Callable[..., Any]
Interceptor = Callable[..., Any]
"""``interceptor(step, *args, **kwargs)``: calls ``step`` once and returns its result, changed or not."""

_ABSENT = object()


class TrainingStepDispatcher:
    """Wraps ``training_step`` on the instance, where accelerators, strategies and tuners all find it.

    There is one a module, so that interceptors can be added and removed in any order; the last removal restores
    the module's ``__dict__`` as it was.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._previous = module.__dict__.get("training_step", _ABSENT)
        self._original: Step = module.training_step
        self._interceptors: list[Interceptor] = []

        @functools.wraps(self._original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = self._original
            for interceptor in self._interceptors:
                step = functools.partial(interceptor, step)
            return step(*args, **kwargs)

        # Lightning looks through __wrapped__ for the user's own signature and code.
        training_step.__wrapped__ = inspect.unwrap(self._original)  # type: ignore[attr-defined]
        training_step.dispatcher = self  # type: ignore[attr-defined]
        self._wrapper = training_step
        module.__dict__["training_step"] = training_step

    def remove(self, interceptor: Interceptor) -> None:
        """Take an interceptor out; without any, the module is as it was."""
        if interceptor in self._interceptors:
            self._interceptors.remove(interceptor)
        # If somebody wrapped the step after us, ours stays below theirs and passes every call on.
        if not self._interceptors and self._module.__dict__.get("training_step") is self._wrapper:
            if self._previous is _ABSENT:
                del self._module.__dict__["training_step"]
            else:
                self._module.__dict__["training_step"] = self._previous

    def add(self, interceptor: Interceptor) -> None:
        """Put an interceptor outside of those that are there."""
        if interceptor not in self._interceptors:
            self._interceptors.append(interceptor)


def intercept_training_step(module: LightningModule, interceptor: Interceptor) -> Callable[[], None]:
    """Send every call of ``module.training_step`` through ``interceptor``; returns the function that undoes it."""
    current = getattr(module.__dict__.get("training_step"), "dispatcher", None)
    dispatcher = current if isinstance(current, TrainingStepDispatcher) else TrainingStepDispatcher(module)
    dispatcher.add(interceptor)
    return functools.partial(dispatcher.remove, interceptor)
