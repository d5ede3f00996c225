"""``lightning`` as a name for ``pytorch_lightning``, so that the same tests run where only the old package is installed.

To import this module makes the alias, if ``lightning`` is not installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

OLD_NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


class Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``lightning.pytorch.callbacks`` as ``pytorch_lightning.callbacks``, the same module, and so on."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for every module of ``lightning``."""
        if fullname != "lightning" and old_name(fullname) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """The module of the old package."""
        old = old_name(spec.name)
        if old is not None:
            module = importlib.import_module(old)
            self._specs[spec.name] = module.__spec__
            return module
        top = types.ModuleType("lightning")
        both = importlib.import_module("pytorch_lightning")
        for name in ("Callback", "LightningDataModule", "LightningModule", "Trainer", "seed_everything", "__version__"):
            setattr(top, name, getattr(both, name))
        return top

    def exec_module(self, module: types.ModuleType) -> None:
        """It is there already; only its spec is the old package's again, which the import has replaced."""
        spec = module.__spec__
        if spec is not None and spec.name in self._specs:
            module.__spec__ = self._specs[spec.name]

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}


def old_name(name: str) -> str | None:
    """``pytorch_lightning.callbacks`` for ``lightning.pytorch.callbacks``; ``None`` for what is not of Lightning."""
    for new, old in OLD_NAMES.items():
        if name == new or name.startswith(new + "."):
            return old + name.removeprefix(new)
    return None


if importlib.util.find_spec("lightning") is None:
    # The package looks for Lightning when it is imported: first, so that it finds what a user without `lightning` has.
    importlib.import_module("lightning_wdefense")
    # Before the finder of files, which would find them too, by the path of their package, and import them a second time.
    sys.meta_path.insert(0, Alias())
