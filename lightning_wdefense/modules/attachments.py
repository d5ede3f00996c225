"""What is put on a user's module for a while, and stays behind when the module is copied, pickled or saved."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

MISSING = object()
"""In place of an entry of ``__dict__`` that is not there."""

_GETSTATE = "__getstate__"


class Attachment:
    """Something of ours in a module's ``__dict__`` or among its hooks.

    While a module has guests, :func:`settle` keeps a ``__getstate__`` on the instance, which ``copy`` and ``pickle`` heed: a copy is a plain
    module of the user's own, loaded without this package. What a class with a ``__deepcopy__`` or ``__reduce__`` of its own
    copies one by one becomes :meth:`value_in_copy`.

    Attributes:
        host: the module that it is on.
    """

    host: nn.Module

    def value_in_state(self) -> Any:
        """What copies have in its place."""
        return MISSING

    def value_in_copy(self, host: nn.Module) -> Any:
        """The same for one copy, that must have something there."""
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
            f"{name} copies its __dict__ in a way of its own, while a wrapper of WassersteinDefense is in it. In __deepcopy__(self, memo) "
            "set memo[id(self)] = copy before attributes are copied with that memo; in __reduce__ take the state from "
            "self.__getstate__()."
        )


class AttachedHook(Attachment):
    """A forward hook or pre-hook."""

    def __init__(self, host: nn.Module, function: Callable[..., Any]) -> None:
        self.host, self._function = host, function

    def __call__(self, *args: Any) -> Any:
        """Look, and change nothing; or return another output."""
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _does_nothing

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


_does_nothing = contextlib.nullcontext().__exit__
"""Takes whatever a hook is given, and is of the standard library, so that it can be loaded anywhere."""


class HookHandle:
    """Takes a hook off again."""

    def __init__(self, host: nn.Module, handle: Any) -> None:
        self._host, self._handle = host, handle

    def remove(self) -> None:
        """Without its last guest, the module is as it was."""
        self._handle.remove()
        restore_getstate(self._host)


def attach_hook(
    module: nn.Module, function: Callable[..., Any], *, before: bool = False, keywords: bool = False
) -> HookHandle:
    """Let ``function(module, args, outputs)`` see each forward pass; with ``before``, ``function(module, args)`` its inputs.

    With ``keywords`` it is given the keyword arguments as well, after the others. What it returns of a pass takes the outputs' place.
    """
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = HookHandle(module, register(AttachedHook(module, function), with_kwargs=keywords))
    exclude_from_copies(module)
    return handle


def exclude_from_copies(module: nn.Module) -> None:
    """See to it that copies of a module that has a guest now are plain."""
    if not isinstance(module.__dict__.get(_GETSTATE), _StateWithoutAttachments):
        module.__dict__[_GETSTATE] = _StateWithoutAttachments(module)


def restore_getstate(module: nn.Module) -> None:
    """Leave a module alone whose last guest has gone."""
    plain = module.__dict__.get(_GETSTATE)
    if isinstance(plain, _StateWithoutAttachments) and not any(map(_has_attachments, _others(module.__dict__))):
        plain.restore()


class _StateWithoutAttachments(Attachment):
    """In place of a module's ``__getstate__``: its state without guests, itself among them."""

    def __init__(self, host: nn.Module) -> None:
        self.host, self._previous = host, host.__dict__.get(_GETSTATE, MISSING)

    def __call__(self) -> Any:
        """What the module's own would return, without guests."""
        if self._previous is not MISSING:
            return _without_attachments(self._previous())
        own = getattr(type(self.host), _GETSTATE, None)  # classes have it from Python 3.11 on
        return _without_attachments(self.host.__dict__ if own is None else own(self.host))

    def value_in_state(self) -> Any:
        return self._previous

    def value_in_copy(self, host: nn.Module) -> Any:
        return _StateWithoutAttachments(host)

    def restore(self) -> None:
        """Put the module's own back."""
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
