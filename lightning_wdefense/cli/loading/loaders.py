"""The batches that ``--data`` describes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.cli.class_paths import refused
from lightning_wdefense.cli.loading.hooks import note_of_hooks, overrides
from lightning_wdefense.cli.loading.images import ImageFolder
from lightning_wdefense.cli.usage import UsageError, note
from lightning_wdefense.modules.paths import tensor_paths, value_at

KIND = "a LightningDataModule or a folder of images"

STAGES = {"test": "test_dataloader", "validate": "val_dataloader", "predict": "predict_dataloader", "fit": "train_dataloader"}  # fmt: skip
"""The dataloader of each stage, by the names of the Trainer's stages."""


class FirstSamples:
    """The batches of a loader until so many samples have come.

    Args:
        loader: the loader.
        samples: number of samples; the batch in which it is reached comes whole.
    """

    def __init__(self, loader: Iterable[Any], samples: int) -> None:
        self._loader, self._samples = loader, samples

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: if the loader does not say how many samples a batch has.
        """
        size = getattr(self._loader, "batch_size", None)
        if not isinstance(size, int):
            raise TypeError("The loader does not say how many samples a batch has.")
        return min(len(self._loader), math.ceil(self._samples / size))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        seen = 0
        for batch in self._loader:
            yield batch
            paths = tensor_paths(batch)
            seen += len(value_at(batch, paths[0])) if paths else 1
            if seen >= self._samples:
                return


def loader_of(given: Any, options: Any, threat: ThreatModel) -> Iterable[Any]:
    """The batches of a stage.

    Args:
        given: the data module that the parser made of a class path, or the text of another ``--data``.
        options: ``stage`` and ``dataloader`` for a data module; ``batch_size``, ``image_size``, ``grayscale`` and ``workers`` for a folder.
        threat: how images are normalised.

    Raises:
        UsageError: if the text is neither a class path nor a folder, or the data module has no such dataloader.
    """
    if isinstance(given, str):
        if not (Path(given).exists() or "/" in given or "\\" in given):
            raise refused("--data", given, KIND)
        images = ImageFolder(Path(given), threat, options.image_size, grayscale=options.grayscale)
        note(f"{len(images)} images of {len(images.classes)} classes: {_classes(images.classes)}")
        return DataLoader(images, options.batch_size, num_workers=options.workers)
    return _of_module(given, options.stage, options.dataloader)


def _of_module(module: Any, stage: str, place: int) -> Any:
    name = type(module).__name__
    has = [each for each, method in STAGES.items() if overrides(module, method)]
    if stage not in has:
        others = " or ".join(f"--stage {each}" for each in has)
        raise UsageError(
            f"{name} has no {STAGES[stage]}(), which --stage {stage} needs. "
            + (f"It has one for {others}." if has else "It has none at all.")
        )
    note_of_hooks(module)
    module.prepare_data()
    module.setup(stage)
    loader = getattr(module, STAGES[stage])()
    if isinstance(loader, (list, tuple)) and loader and not hasattr(loader, "batch_size"):
        if place >= len(loader):
            raise UsageError(f"--dataloader {place}: {name} gives {len(loader)} for --stage {stage}, counted from 0.")
        if len(loader) > 1:
            note(f"{name} gives {len(loader)} dataloaders; --dataloader {place} is measured.")
        return loader[place]
    if loader is None or loader == []:
        raise UsageError(f"{STAGES[stage]}() of {name} returns {loader!r}, so there is nothing to measure.")
    return loader


def _classes(names: list[str]) -> str:
    shown = [f"{index} is {name!r}" for index, name in enumerate(names[:3])]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
