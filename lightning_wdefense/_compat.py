"""Lightning's names, from ``lightning.pytorch`` where it is installed, otherwise from ``pytorch_lightning``."""

from __future__ import annotations

import sys
from typing import Any

from packaging.version import Version

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn
except ImportError:  # pragma: no cover - a pipeline that has only the old package
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[no-redef, assignment]
    from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[no-redef, assignment]
    from pytorch_lightning.utilities.rank_zero import rank_zero_warn  # type: ignore[no-redef, assignment]

__all__ = [
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "dataloader_suffix",
    "is_a",
    "loggable_key",
    "rank_zero_warn",
]


_DATALOADER = "/dataloader_idx_"
"""Before the index in Lightning's own suffix."""


def dataloader_suffix(index: int) -> str:
    """Suffix of a logged key for one of several dataloaders: Lightning's own, where it can be logged."""
    return loggable_key(f"{_DATALOADER}{index}")


def loggable_key(key: str) -> str:
    """The key under which a value of one of several dataloaders can be logged.

    From Lightning 2.5.3 it is the key itself. Older versions refuse the suffix ``/dataloader_idx_0``, which is then ``/dataloader_0``.
    """
    version = Version(sys.modules[Trainer.__module__.split(".trainer")[0]].__version__)  # type: ignore[attr-defined]
    return key if version >= Version("2.5.3") else key.replace(_DATALOADER, "/dataloader_")


def is_a(instance: Any, class_name: str) -> bool:
    """Whether an object's class, or one of its base classes, has this name, in either namespace."""
    return any(cls.__name__ == class_name for cls in type(instance).__mro__)
