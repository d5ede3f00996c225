"""Run a module's step without effect on the trainer's logs, loggers, optimizers and schedulers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lightning_wdefense._compat import LightningModule, Trainer, is_a
from lightning_wdefense.modules.attachments import MISSING, Attachment, exclude_from_copies, restore_getstate

Logged = dict[str, Any]


@contextlib.contextmanager
def logging_to(trainer: Trainer, results: Any) -> Iterator[None]:
    """A context in which ``self.log`` writes to this collection of results, and the loggers ignore everything."""
    connector, loop = trainer._logger_connector, _loop_of(trainer)
    before, current, loggers = getattr(loop, "_results", None), connector._current_fx, trainer.loggers
    trainer.loggers = [MutedLogger(each) for each in loggers]  # type: ignore[misc]
    if loop is not None:  # the trainer runs
        loop._results = results
    try:
        yield
    finally:
        connector._current_fx, trainer.loggers = current, loggers
        if loop is not None:
            loop._results = before


@contextlib.contextmanager
def muted(module: LightningModule, fx: str) -> Iterator[Logged]:
    """A context in which the module's code runs as in its hook ``fx``, without effect on logs, optimizers and schedulers.

    Args:
        module: the user's module.
        fx: name of the hook, such as ``"training_step"``.

    Yields:
        A dictionary with the last value that was logged under each key, with its autograd graph.
    """
    trainer: Any = getattr(module, "_trainer", None)
    logged: Logged = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(muted_optimizers(module))
        for each in _lightning_modules(module):  # Lightning's own log() would detach the logged values
            stack.enter_context(_replaced_methods(each, _logs_to(logged)))
        if is_a(trainer, "Trainer"):
            stack.enter_context(running_hook(module, fx))
            stack.enter_context(logging_to(trainer, discarding_results()))
        yield logged


@contextlib.contextmanager
def muted_optimizers(module: LightningModule) -> Iterator[None]:
    """A context in which a module's calls of its optimizers, schedulers and manual optimization have no effect."""
    with contextlib.ExitStack() as stack:
        for each in _lightning_modules(module):
            stack.enter_context(_replaced_methods(each, _inert_methods(each)))
        yield


def _lightning_modules(module: LightningModule) -> list[Any]:
    return [each for each in module.modules() if is_a(each, "LightningModule")]


@contextlib.contextmanager
def running_hook(module: LightningModule, fx: str) -> Iterator[None]:
    """A context in which ``self.log`` behaves as in the hook ``fx``."""
    before = module._current_fx_name
    module._current_fx_name = fx
    try:
        yield
    finally:
        module._current_fx_name = before


def discarding_results() -> Any:
    """A collection of results as Lightning expects it, which discards everything."""

    class DiscardingResults(result_collection()):  # type: ignore[misc]
        def log(self, *args: Any, **kwargs: Any) -> None:
            pass

    return DiscardingResults(training=False)


def result_collection() -> Any:
    """Lightning's class for the results that are logged in an epoch."""
    package = Trainer.__module__.split(".trainer")[0]
    return sys.modules[f"{package}.trainer.connectors.logger_connector.result"]._ResultCollection  # type: ignore[attr-defined]


def _loop_of(trainer: Trainer) -> Any:
    """The loop that ``self.log`` currently writes results to."""
    loop: Any = trainer._active_loop
    if hasattr(loop, "epoch_loop"):
        loop = loop.epoch_loop if trainer.training else loop.epoch_loop.val_loop
    return loop


class MutedLogger:
    """A stand-in for a logger: attributes can be read, but everything logged to it or to its experiment is discarded."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._logger)

    @property
    def experiment(self) -> NullObject:
        """An object that accepts every call and every attribute."""
        return NullObject()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._logger, name)
        return NullObject() if callable(found) else found


class NullObject:
    """An object whose attributes, items and results are the object itself."""

    def __getattr__(self, name: str) -> NullObject:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> NullObject:
        """Return the object itself."""
        return self

    def __getitem__(self, key: Any) -> NullObject:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class InertOptimizer:
    """A stand-in for an optimizer or a scheduler: its attributes can be read, but methods that change it have no effect."""

    _INERT = frozenset({"step", "zero_grad", "load_state_dict", "add_param_group", "toggle_model"})

    def __init__(self, wrapped: Any) -> None:
        self.__dict__["_wrapped"] = wrapped

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._wrapped)

    def __getattr__(self, name: str) -> Any:
        if name in self._INERT:
            return _do_nothing
        found = getattr(self._wrapped, name)
        if name == "param_groups":  # a step may set learning rates there
            return [dict(each) for each in found]
        return InertOptimizer(found) if name in ("optimizer", "_optimizer") else found

    def __setattr__(self, name: str, value: Any) -> None:
        pass


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _inert_methods(module: LightningModule) -> dict[str, Callable[..., Any]]:
    """Methods of a LightningModule that change optimizers, schedulers or gradients, each replaced by one without effect."""

    def inert(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = getattr(type(module), name)(module, *args, **kwargs)
            return (
                [InertOptimizer(each) for each in found] if isinstance(found, list) else found and InertOptimizer(found)
            )

        return call

    nothing = ("manual_backward", "backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients", "print")
    return {name: inert(name) for name in ("optimizers", "lr_schedulers")} | dict.fromkeys(nothing, _do_nothing)


def _logs_to(logged: Logged) -> dict[str, Callable[..., Any]]:
    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = value

    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        logged.update(dictionary)

    return {"log": log, "log_dict": log_dict}


class _ReplacedMethod(Attachment):
    """A function that replaces a method of a module; copies of the module do not contain it."""

    def __init__(self, host: LightningModule, name: str, function: Callable[..., Any]) -> None:
        self.host, self._name, self._function = host, name, function
        self._previous = vars(host).get(name, MISSING)
        vars(host)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def value_in_state(self) -> Any:
        return self._previous

    def value_in_copy(self, host: Any) -> Any:
        return getattr(type(host), self._name).__get__(host)

    def restore(self) -> None:
        """Restore the module's own method."""
        if self._previous is MISSING:
            vars(self.host).pop(self._name, None)
        else:
            vars(self.host)[self._name] = self._previous


@contextlib.contextmanager
def _replaced_methods(module: LightningModule, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    replaced = [_ReplacedMethod(module, name, function) for name, function in functions.items()]
    exclude_from_copies(module)
    try:
        yield
    finally:
        for each in replaced:
            each.restore()
        restore_getstate(module)
