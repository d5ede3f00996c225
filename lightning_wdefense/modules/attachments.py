"""Attach hooks and wrappers to a user's module so that copies, pickles and checkpoints of the module do not contain them."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

MISSING = object()
"""Marks an entry that is missing in a ``__dict__``."""

_GETSTATE = "__getstate__"


class Attachment:
    """An object of this package in a module's ``__dict__`` or among its hooks.

    While a module has attachments, :func:`exclude_from_copies` sets a ``__getstate__`` on the instance, which ``copy``
    and ``pickle`` call. So a copy contains the user's module only, and can be loaded without this package. If a class
    has its own ``__deepcopy__`` or ``__reduce__`` and copies attribute by attribute, the copy contains
    :meth:`value_in_copy`.

    Attributes:
        host: the module that the object is attached to.
    """

    host: nn.Module

    def value_in_state(self) -> Any:
        """The value in the state of copies in place of this object; :data:`MISSING` for no entry."""
        return MISSING

    def value_in_copy(self, host: nn.Module) -> Any:
        """The value in one copy that needs an entry in place of this object.

        Args:
            host: the copy of the module.
        """
        return self.value_in_state()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        host = memo.get(id(self.host))
        if host is None:
            raise self._copy_error()
        return self.value_in_copy(host)

    def __reduce__(self) -> Any:
        raise self._copy_error()

    def _copy_error(self) -> Exception:
        name = type(self.host).__name__
        return pickle.PicklingError(
            f"{name} copies its __dict__ with its own code, but a wrapper of WassersteinDefense is in it. In __deepcopy__(self, memo) "
            "set memo[id(self)] = copy before you copy attributes with that memo; in __reduce__ take the state from "
            "self.__getstate__()."
        )


class AttachedHook(Attachment):
    """A forward hook or pre-hook."""

    def __init__(self, host: nn.Module, function: Callable[..., Any]) -> None:
        self.host, self._function = host, function

    def __call__(self, *args: Any) -> Any:
        """Call the function; a result that is not ``None`` replaces the outputs."""
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _does_nothing

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


_does_nothing = contextlib.nullcontext().__exit__
"""A function that accepts any arguments of a hook and returns ``None``; from the standard library, so it can be unpickled anywhere."""


class HookHandle:
    """Removes a hook."""

    def __init__(self, host: nn.Module, handle: Any) -> None:
        self._host, self._handle = host, handle

    def remove(self) -> None:
        """Remove the hook. If it was the last attachment, the module is as before."""
        self._handle.remove()
        restore_getstate(self._host)


def attach_hook(
    module: nn.Module, function: Callable[..., Any], *, before: bool = False, keywords: bool = False
) -> HookHandle:
    """Register a forward hook that copies of the module do not contain.

    Args:
        module: the module.
        function: called as ``function(module, args, outputs)`` after each forward pass. A result that is not ``None``
            replaces the outputs.
        before: register a pre-hook instead: ``function(module, args)``, before each forward pass.
        keywords: pass the keyword arguments too, after ``args``.
    """
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = HookHandle(module, register(AttachedHook(module, function), with_kwargs=keywords))
    exclude_from_copies(module)
    return handle


def exclude_from_copies(module: nn.Module) -> None:
    """Make copies of a module with attachments contain none of them."""
    if not isinstance(module.__dict__.get(_GETSTATE), _StateWithoutAttachments):
        module.__dict__[_GETSTATE] = _StateWithoutAttachments(module)


def restore_getstate(module: nn.Module) -> None:
    """Restore a module's own ``__getstate__`` if it has no attachments any more."""
    plain = module.__dict__.get(_GETSTATE)
    if isinstance(plain, _StateWithoutAttachments) and not any(map(_has_attachments, _others(module.__dict__))):
        plain.restore()


class _StateWithoutAttachments(Attachment):
    """Replaces a module's ``__getstate__``: returns the module's state without attachments, and without this object."""

    def __init__(self, host: nn.Module) -> None:
        self.host, self._previous = host, host.__dict__.get(_GETSTATE, MISSING)

    def __call__(self) -> Any:
        """The result of the module's own ``__getstate__``, without attachments."""
        if self._previous is not MISSING:
            return _without_attachments(self._previous())
        own = getattr(type(self.host), _GETSTATE, None)  # classes have it from Python 3.11 on
        return _without_attachments(self.host.__dict__ if own is None else own(self.host))

    def value_in_state(self) -> Any:
        return self._previous

    def value_in_copy(self, host: nn.Module) -> Any:
        return _StateWithoutAttachments(host)

    def restore(self) -> None:
        """Restore the module's own ``__getstate__``."""
        if self._previous is MISSING:
            del self.host.__dict__[_GETSTATE]
        else:
            self.host.__dict__[_GETSTATE] = self._previous


def _others(attributes: dict[str, Any]) -> Iterable[Any]:
    return (value for value in attributes.values() if not isinstance(value, _StateWithoutAttachments))


def _has_attachments(value: Any) -> bool:
    return isinstance(value, Attachment) or (
        isinstance(value, dict) and any(isinstance(it, Attachment) for it in value.values())
    )


def _without_attachments(state: Any) -> Any:
    if isinstance(state, tuple):  # with slots
        return tuple(map(_without_attachments, state))
    if not isinstance(state, dict):
        return state
    plain = {}
    for name, value in state.items():
        if isinstance(value, Attachment):
            value = value.value_in_state()
        elif _has_attachments(value):  # hooks
            value = type(value)((key, it) for key, it in value.items() if not isinstance(it, Attachment))
        if value is not MISSING:
            plain[name] = value
    return plain
