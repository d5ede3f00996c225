"""A folder of images, one sub-folder a class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.cli.usage import UsageError
from lightning_wdefense.modules.outputs import logits_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Files with other endings are left out, as by torchvision's ImageFolder."""


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images ``(C, H, W)`` in model units with the index of their class: the place of the sub-folder's name in the alphabet.

    These are the classes of torchvision's ``ImageFolder``. Images are scaled to the bounds of the threat model, or to [0, 1] without bounds, then to the size if there is one (so that it is
    covered, then cut out of the middle), and normalised by the threat model. A sub-folder without images is a class without images.

    Args:
        folder: the folder.
        threat: mean and std for the normalisation.
        size: height and width in pixels; ``None`` for that of the images, which must be the same for all.
        grayscale: one channel instead of three.

    Raises:
        UsageError: if there is no such folder, if it has no images in sub-folders or only one sub-folder, or if Pillow is missing.
    """

    def __init__(
        self, folder: Path, threat: ThreatModel, size: tuple[int, int] | None = None, *, grayscale: bool = False
    ) -> None:
        if not folder.is_dir():
            raise UsageError(f"--data {folder}: there is no such folder.")
        try:
            import PIL.Image  # noqa: F401
        except ModuleNotFoundError as error:
            raise UsageError("A folder of images needs Pillow: pip install pillow") from error
        found = {each.name: _images(each) for each in sorted(folder.iterdir()) if each.is_dir()}
        self.classes = list(found)
        expected = f"Expected is one sub-folder for each class, with images ({', '.join(SUFFIXES)}) in it."
        if not any(found.values()):
            loose = len(_images(folder, deep=False))
            raise UsageError(
                f"--data {folder}: "
                + (f"images stand in no sub-folder ({loose}). " if loose else "there is no image. ")
                + expected
            )
        if len(self.classes) == 1:
            raise UsageError(f"--data {folder}: there is only one class, {self.classes[0]!r}. {expected}")
        self._folder, self._threat, self._size, self._grayscale = folder, threat, size, grayscale
        self._items = [(path, index) for index, name in enumerate(self.classes) for path in found[name]]
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image and its class.

        Raises:
            UsageError: if the file is no image, or its size is another than that of the images before it.
        """
        from PIL import Image, ImageOps

        path, label = self._items[index]
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self._grayscale else "RGB")
        except OSError as error:
            raise UsageError(f"{path} cannot be read as an image: {error}.") from error
        if self._size is not None:
            image = ImageOps.fit(image, self._size[::-1], Image.Resampling.BILINEAR)
        low, high = self._threat.bounds or (0.0, 1.0)
        pixels = low + (high - low) * torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        self._check_shape(path, tuple(pixels.shape))
        return self._threat.to_model(pixels.unsqueeze(0)).squeeze(0).contiguous(), label

    def check_outputs(self, model: Callable[[Tensor], Any], device: torch.device | None) -> None:
        """Check that the model has as many classes as there are sub-folders. Otherwise the labels mean other classes.

        Args:
            model: from inputs to logits.
            device: where the model runs.

        Raises:
            UsageError: if it has not.
        """
        try:
            with torch.no_grad():
                classes = logits_of(model(self[0][0].unsqueeze(0).to(device))).shape[1]
        except UsageError:
            raise
        except Exception:  # the evaluation says what is wrong
            return
        if classes != len(self.classes):
            raise UsageError(
                f"--data {self._folder} has {len(self.classes)} sub-folders, but the model {classes} classes. A sub-folder's place in the "
                "alphabet is the label, so every class needs one: an empty one if it has no image."
            )

    def _check_shape(self, path: Path, shape: tuple[int, ...]) -> None:
        self._shape = self._shape or shape
        if shape != self._shape:
            raise UsageError(
                f"The images differ in size: {path} has {shape[1]} x {shape[2]} pixels, those before it {self._shape[1]} x {self._shape[2]}. "
                "Give --image-size."
            )


def _images(folder: Path, *, deep: bool = True) -> list[Path]:
    files: Any = folder.rglob("*") if deep else folder.glob("*")
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES and path.is_file())
