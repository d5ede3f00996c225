"""The model that ``--model`` and ``--checkpoint`` describe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_wdefense._compat import LightningModule
from lightning_wdefense.cli.class_paths import refused
from lightning_wdefense.cli.loading.checkpoints import Checkpoint
from lightning_wdefense.cli.loading.exported import ExportedModel
from lightning_wdefense.cli.loading.hooks import note_of_hooks, overrides
from lightning_wdefense.cli.usage import UsageError, note

TWINS = (
    "A twin has the class and the init arguments of the model; any other can be given as a file of torch.export (.pt2)."
)
"""What to do if the twin's checkpoint does not fit."""

KIND = "an nn.Module, a LightningModule or a file of torch.export (.pt2)"


def model_of(given: Any, checkpoint: Checkpoint | None, device: str) -> nn.Module:
    """The model, with the weights of the checkpoint, on its device.

    Args:
        given: the module that the parser made of a class path, or the text of another ``--model``.
        checkpoint: its weights.
        device: such as ``"cuda:0"``; ``"auto"`` for an accelerator if there is one (an exported program stays where it was exported).

    Raises:
        UsageError: if the text is neither a class path nor a file, or the checkpoint does not fit.
    """
    if isinstance(given, str):
        if not (given.endswith(".pt2") or Path(given).exists()):
            raise refused("--model", given, KIND)
        if checkpoint is not None:
            raise UsageError(f"--model {given} holds its own weights: leave out --checkpoint.")
        return ExportedModel(Path(given), None if device == "auto" else device_of(device))
    if isinstance(given, LightningModule):
        _check_forward(given)
        note_of_hooks(given)
        given.configure_model()
    if checkpoint is None:
        note("Without --checkpoint the weights are those of a new model.")
    else:
        checkpoint.load_into(given)
    return given.to(device_of(device)).eval()


def twin_of(model: nn.Module, given: str | None, device: str, *, trust: bool) -> nn.Module | None:
    """The undefended twin that ``--twin`` names: other weights for the same class, or a program of its own.

    Args:
        model: the model whose class and arguments the twin has.
        given: a checkpoint, or a file of ``torch.export``; ``None`` for no twin.
        device: as in :func:`model_of`.
        trust: run the code that a pickled checkpoint may hold.

    Raises:
        UsageError: if there is no such file, or it does not fit the class.
    """
    if given is None:
        return None
    if given.endswith(".pt2"):
        return model_of(given, None, device)
    if isinstance(model, ExportedModel):
        raise UsageError(
            f"--twin {given}: the twin of an exported model is an exported model, a file that ends in .pt2."
        )
    checkpoint = Checkpoint.read(Path(given), trust=trust, option="--twin")
    twin = copy.deepcopy(model)
    checkpoint.load_into(twin, advice=TWINS)
    return twin


def _check_forward(model: LightningModule) -> None:
    if not overrides(model, "forward"):
        raise UsageError(
            f"{type(model).__name__} has no forward(), by which it is attacked. Give it one that returns logits, or give the network inside, "
            "--model my_project.Network: it takes its part of the same checkpoint."
        )


def device_of(text: str) -> torch.device:
    """A device by its name.

    Raises:
        UsageError: if there is no such device.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {text}: {str(error).splitlines()[0]}") from error
    return device
