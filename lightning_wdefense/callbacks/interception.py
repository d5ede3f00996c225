"""Stand between Lightning and a module's ``training_step``, and leave it as it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lightning_wdefense._compat import LightningModule
from lightning_wdefense.modules.attachments import ABSENT, Guest, depart, settle

Step = Callable[..., Any]
Interceptor = Callable[..., Any]
"""``interceptor(step, *args, **kwargs)``: calls ``step`` once and returns its result, changed or not."""


class TrainingStepDispatcher(Guest):
    """Stands for ``training_step`` on the instance, where accelerators, strategies and tuners all find it.

    There is one a module, so that interceptors can be added and removed in any order; the last removal restores
    the module's ``__dict__`` as it was.
    """

    def __init__(self, module: LightningModule) -> None:
        self.host: LightningModule = module
        self._previous = module.__dict__.get("training_step", ABSENT)
        self.original: Step = module.training_step
        self._interceptors: list[Interceptor] = []
        functools.update_wrapper(self, self.original, updated=())
        # Lightning looks through __wrapped__ for the user's own signature and code.
        self.__wrapped__ = inspect.unwrap(self.original)
        module.__dict__["training_step"] = self
        settle(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step, through all interceptors."""
        step = self.original
        for interceptor in self._interceptors:
            step = functools.partial(interceptor, step)
        return step(*args, **kwargs)

    def left_behind(self) -> Any:
        """The copy's own step."""
        return self._previous

    def in_a_copy(self, host: Any) -> Any:
        """The same, as an attribute."""
        return type(host).training_step.__get__(host)

    def remove(self, interceptor: Interceptor) -> None:
        """Take an interceptor out; without any, the module is as it was."""
        if interceptor in self._interceptors:
            self._interceptors.remove(interceptor)
        # If somebody wrapped the step after us, ours stays below theirs and passes every call on.
        if not self._interceptors and self.host.__dict__.get("training_step") is self:
            if self._previous is ABSENT:
                del self.host.__dict__["training_step"]
            else:
                self.host.__dict__["training_step"] = self._previous
            depart(self.host)

    def add(self, interceptor: Interceptor) -> None:
        """Put an interceptor outside of those that are there."""
        if interceptor not in self._interceptors:
            self._interceptors.append(interceptor)


def intercept_training_step(module: LightningModule, interceptor: Interceptor) -> Callable[[], None]:
    """Send every call of ``module.training_step`` through ``interceptor``; returns the function that undoes it."""
    current = module.__dict__.get("training_step")
    dispatcher = current if isinstance(current, TrainingStepDispatcher) else TrainingStepDispatcher(module)
    dispatcher.add(interceptor)
    return functools.partial(dispatcher.remove, interceptor)
