"""Checkpoints: read without running code in them, and loaded into a model that they fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense._compat import LightningModule
from lightning_wdefense.cli.class_paths import imported, makes_objects
from lightning_wdefense.cli.usage import UsageError, note

SHOWN = 3
"""Number of keys of each side that a message lists."""

COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the keys of a module."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        path: the file.
        content: of a Lightning checkpoint all that it holds; of other files empty.
        weights: the parameters and buffers by their keys.
        option: the option that names the file, for messages.
    """

    path: Path
    content: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    option: str = "--checkpoint"

    @classmethod
    def read(cls, path: Path, *, trust: bool = False, option: str = "--checkpoint") -> Checkpoint:
        """A Lightning checkpoint, or a plain state_dict.

        Args:
            path: the file.
            trust: run the code that a pickled file may hold.
            option: the option that names the file, for messages.

        Raises:
            UsageError: if there is no such file, it is no checkpoint, or it holds more than tensors and plain values and is not trusted.
        """
        if not path.is_file():
            raise UsageError(f"{option} {path}: there is no such file.")
        try:
            found = torch.load(path, map_location="cpu", weights_only=not trust)
        except Exception as error:  # torch.load has many
            if "weights_only" in str(error) and _is_pickled(path):
                raise UsageError(
                    f"{option} {path} holds more than tensors and plain values{_unsafe(str(error))}. Reading that can run code: give "
                    "--trust-checkpoint if you trust who made the file, or store a state_dict alone."
                ) from error
            what = f"cannot be read: {_first_line(error)}" if trust else "is no checkpoint of PyTorch or Lightning"
            raise UsageError(f"{option} {path} {what}.") from error
        if isinstance(found, nn.Module):
            return cls(path, {}, found.state_dict(), option)
        if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
            content, weights = found, found["state_dict"]
        else:
            content, weights = {}, found
        if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
            there = f"the keys {_listed(list(map(str, found)))}" if isinstance(found, Mapping) else _kind(found)
            raise UsageError(
                f"{option} {path} holds no weights but {there}: give a Lightning checkpoint, or what torch.save(model.state_dict(), ...) wrote."
            )
        return cls(path, content, {str(key).replace(COMPILED, ""): value for key, value in weights.items()}, option)

    def init_args(self, class_path: str | None) -> tuple[str | None, dict[str, Any]]:
        """The class path and the init arguments that ``save_hyperparameters()`` stored.

        Args:
            class_path: the class of the user; ``None`` for the one that LightningCLI stored.

        Returns:
            The class path, and those of the arguments that the class takes and that are plain values.
        """
        stored = dict(self.content.get("hyper_parameters") or {})
        class_path = class_path or stored.get("_class_path")
        if class_path is None:
            return None, {}
        try:
            found = imported(class_path)
            signature = inspect.signature(found)  # type: ignore[arg-type]
        except (UsageError, TypeError, ValueError):
            return class_path, {}  # the parser says what is wrong with it
        if not makes_objects(found):
            return class_path, {}
        taken = set(signature.parameters)
        named = self.content.get("hparams_name")
        if named in taken and named != "kwargs":  # save_hyperparameters of one argument that is a mapping
            stored = {str(named): stored}
        return class_path, {key: value for key, value in stored.items() if key in taken and _is_plain(value)}

    def load_into(self, model: nn.Module, *, advice: str = "") -> None:
        """Load the weights into a model.

        A plain network takes its part of the weights of a LightningModule: all keys with one prefix, if just one prefix has them all.

        Args:
            model: the model.
            advice: what to do if they do not fit; by default to look at the class and its init arguments.

        Raises:
            UsageError: if the keys or the shapes do not fit; the message lists the first that differ.
        """
        if isinstance(model, LightningModule):
            if self.content:
                model.on_load_checkpoint(dict(self.content))
            if not model.strict_loading:
                model.load_state_dict(self.weights, strict=False)
                return
        wanted, weights = model.state_dict(), dict(self.weights)
        if wanted.keys() != weights.keys() and (prefix := self._prefix(wanted)):
            note(f"The weights are those under {prefix!r} of {self.path}.")
            weights = {key: self.weights[prefix + key] for key in wanted}
        missing, unexpected = (
            [key for key in one if key not in other] for one, other in ((wanted, weights), (weights, wanted))
        )
        if missing or unexpected:
            raise UsageError(
                f"{self.option} {self.path} does not fit the model. {_counted(missing, 'the model has and the checkpoint lacks')}; "
                f"{_counted(unexpected, 'the checkpoint has and the model lacks')}. "
                f"{advice or 'Is it of another class, or do its init arguments differ?'}"
            )
        apart = [
            f"{key} is {tuple(weights[key].shape)} in the checkpoint and {tuple(value.shape)} in the model"
            for key, value in wanted.items()
            if isinstance(value, Tensor) and weights[key].shape != value.shape
        ]
        if apart:
            raise UsageError(
                f"{self.option} {self.path} does not fit the model: {len(apart)} of {len(wanted)} shapes differ. {'; '.join(apart[:SHOWN])}"
                f"{'; ...' if len(apart) > SHOWN else ''}. "
                f"{advice or 'Give the init arguments with which it was trained, such as --model.init_args.width.'}"
            )
        model.load_state_dict(weights)

    def _prefix(self, wanted: Mapping[str, Any]) -> str:
        """The prefix under which the checkpoint has all the keys of the model; empty if there is none."""
        first = next(iter(wanted), None)
        if first is None:
            return ""
        ends = [key[: -len(first)] for key in self.weights if key.endswith("." + first)]
        found = [prefix for prefix in ends if all(prefix + key in self.weights for key in wanted)]
        if len(found) > 1:
            raise UsageError(
                f"{self.option} {self.path} has weights for the model under several names: {_listed(found)}. Give the whole LightningModule "
                "with --model, or store the state_dict of the one that is meant."
            )
        return found[0] if found else ""


def _is_pickled(path: Path) -> bool:
    """Whether a file may hold Python objects: PyTorch's archive, or a pickle of the old form."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _unsafe(message: str) -> str:
    found = re.search(r"(?:GLOBAL|class|global)\s+`?([\w.]+\.\w+)`?", message)
    return f", such as {found[1]}" if found else ""


def _is_plain(value: Any) -> bool:
    """Whether a parser can take the value as it is."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _counted(keys: Sequence[str], what: str) -> str:
    return f"{len(keys)} key{'s' * (len(keys) != 1)} that {what}" + (f": {_listed(keys)}" if keys else "")


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys[:SHOWN])) + (", ..." if len(keys) > SHOWN else "")


def _kind(found: object) -> str:
    return f"a {type(found).__name__}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
