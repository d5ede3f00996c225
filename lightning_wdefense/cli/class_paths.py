"""Class paths that do not lead to a class: how far they lead, and what was perhaps meant."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re

from lightning_wdefense._names import unknown_name
from lightning_wdefense.cli.usage import UsageError

SHOWN = 8
"""Number of names that a message lists."""


def imported(path: str) -> object:
    """The object at a class path, such as ``"my_project.models.Net"``.

    Raises:
        UsageError: if there is none; the message says how far the path leads, with the nearest names.

    Example:
        >>> imported("torch.nn.Linaer")
        Traceback (most recent call last):
        lightning_wdefense.cli.usage.UsageError: There is no class in torch.nn 'Linaer'. Did you mean 'Linear' ...?
    """
    *parents, name = path.split(".")
    module = None
    for end in range(1, len(parents) + 1):
        place = ".".join(parents[:end])
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name != place:
                raise UsageError(f"{place} cannot be imported: {error}.") from error
            return _attribute(module, [*parents[end - 1 :], name], ".".join(parents[: end - 1]), place)
        except Exception as error:
            raise UsageError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    return _attribute(module, [name], ".".join(parents), path)


def refused(option: str, path: str, kind: str) -> UsageError:
    """The error for what an option was given in the place of a class path.

    Args:
        option: the option, such as ``"--model"``.
        path: what it was given.
        kind: what it takes.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
        return UsageError(f"{option} {path}: this is neither a class path, such as my_project.MyClass, nor {kind}.")
    try:
        found = imported(path)
    except UsageError as error:
        return UsageError(f"{option} {path}: {error}")
    return UsageError(f"{option} {path}: this is {_what(found)}. It must be {kind}, or the path of a class for it.")


def _attribute(module: object | None, names: list[str], place: str, missing: str) -> object:
    found = module
    for name in names:
        if found is None or not hasattr(found, name):
            raise UsageError(_nearest(found, name, place or os.getcwd(), missing))
        found, place = getattr(found, name), f"{place}.{name}"
    return found


def _nearest(owner: object | None, name: str, place: str, missing: str) -> str:
    if owner is None:
        local = [each.name for each in pkgutil.iter_modules([place])]
        known = local or [each.name for each in pkgutil.iter_modules()]
        text = unknown_name("module", name, known)
        if "Did you mean" in text or len(local) in range(1, SHOWN):
            return text.replace(" Known:", f" Modules in {place}:") if local else text.split(" Known:")[0]
        return f"There is no module {name!r}, neither installed nor in {place}."
    own = [each for each, value in vars(owner).items() if each[:1] != "_" and makes_objects(value)]
    below = [each.name for each in pkgutil.iter_modules(getattr(owner, "__path__", []))]
    text = unknown_name(f"class in {place}", name, [*own, *below] or ["nothing"])
    return text if len(own) + len(below) <= SHOWN else text.split(" Known:")[0]


def makes_objects(found: object) -> bool:
    """Whether it is a class, or a function that says what it returns."""
    return isinstance(found, type) or (inspect.isfunction(found) and "return" in found.__annotations__)


def _what(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}, which is something else"
    if inspect.isfunction(found) and not makes_objects(found):
        return f"a function that does not say what it returns; write def {found.__name__}(...) -> torch.nn.Module, if it returns one"
    return f"a {type(found).__name__}"
