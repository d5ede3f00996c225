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
    "rank_zero_warn",
]


def dataloader_suffix(index: int) -> str:
    """Suffix of a logged key for one of several dataloaders.

    From Lightning 2.5.3 it is Lightning's own suffix; older versions reserve that one for themselves.
    """
    version = Version(sys.modules[Trainer.__module__.split(".trainer")[0]].__version__)  # type: ignore[attr-defined]
    return f"/dataloader_idx_{index}" if version >= Version("2.5.3") else f"/dataloader_{index}"


def is_a(instance: Any, class_name: str) -> bool:
    """Whether an object's class, or one of its base classes, has this name, in either namespace."""
    return any(cls.__name__ == class_name for cls in type(instance).__mro__)
