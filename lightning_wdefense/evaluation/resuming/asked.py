"""What an evaluation was asked for: all that decides its values, but the data."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import nn

from lightning_wdefense.evaluation.resuming.fingerprint import described, model_digest


def asked_for(model: nn.Module, **settings: Any) -> dict[str, str]:
    """The model, the settings, the surrounding autocast and the versions, as texts that can be compared.

    Args:
        model: the model that is evaluated.
        settings: settings of the evaluation.
    """
    autocast = [
        f"{device} {torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    versions = [f"{name} {_version(name)}" for name in ("torch", "lightning-wdefense")]
    texts = {name: described(value) for name, value in settings.items()}
    return {"model": model_digest(model), **texts, "autocast": ", ".join(autocast), "versions": ", ".join(versions)}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
