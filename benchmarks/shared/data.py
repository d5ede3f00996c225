"""Images, drawn once and for all by a fixed seed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.shared.protocol import Protocol

SHAPES = {"mnist": (28, 28), "cifar10": (32, 32, 3)}
KEYS = ("x_train", "y_train", "x_test", "y_test")


class Images(NamedTuple):
    """Images ``(N, C, H, W)`` in [0, 1] and their classes."""

    x: Tensor
    y: Tensor

    def first(self, count: int) -> Images:
        return Images(self.x[:count], self.y[:count])


class Splits(NamedTuple):
    train: Images
    validation: Images
    test: Images

    @property
    def fingerprint(self) -> str:
        """The same for the same images in the same order."""
        digest = hashlib.sha256()
        for part in self:
            for tensor in part:
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:8]


def load(protocol: Protocol, folder: Path | None) -> Splits:
    """Training, validation and test images.

    Raises:
        ValueError: if the file is missing, holds something else, or holds too few images.
    """
    if protocol.dataset == "digits":
        digits = load_digits()
        x, y, order = digits.images / 16, digits.target, _order(len(digits.target))
        count = len(y) - protocol.test
        parts = (x[order[:count]], y[order[:count]]), (x[order[count:]], y[order[count:]])
    else:
        x, y, x_test, y_test = _read(protocol.dataset, folder)
        order, order_test = _order(len(y)), _order(len(y_test))[: protocol.test]
        parts = (x[order], y[order]), (x_test[order_test], y_test[order_test])
    (x, y), (x_test, y_test) = parts
    # Validation images come first, so that another number of training images leaves them as they are.
    wanted, held_out = protocol.validation + protocol.train, protocol.validation
    if len(y) < wanted or len(y_test) < protocol.test:
        raise ValueError(
            f"{protocol.dataset} has {max(len(y), 0)} images beside the test images, which are {len(y_test)}, but "
            f"{wanted} (training and validation) and {protocol.test} are wanted: lower --limit-train, --validation or --test."
        )
    return Splits(
        _images(x[held_out:wanted], y[held_out:wanted]), _images(x[:held_out], y[:held_out]), _images(x_test, y_test)
    )


def _order(count: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(count)


def _images(x: np.ndarray, y: np.ndarray) -> Images:
    scaled = torch.tensor(x, dtype=torch.float32) / (255 if x.dtype == np.uint8 else 1)
    return Images(
        scaled.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else scaled.unsqueeze(1), torch.tensor(y).long()
    )


def _read(dataset: str, folder: Path | None) -> list[np.ndarray]:
    """The four arrays of ``{dataset}.npz``."""
    shape = SHAPES[dataset]
    wanted = (
        f"{dataset}.npz with x_train and x_test (uint8 images, N x {' x '.join(map(str, shape))}), y_train and y_test"
    )
    if folder is None:
        raise ValueError(f"--dataset {dataset} needs --data: the folder that holds {wanted}.")
    path = folder / f"{dataset}.npz"
    if not path.is_file():
        raise ValueError(f"There is no {path}. --data is the folder that holds {wanted}.")
    try:
        with np.load(path) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                raise ValueError(
                    f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}. Needed: {wanted}."
                )
            arrays = [file[key] for key in KEYS]
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Needed: {wanted}.") from error
    for images, labels in (arrays[:2], arrays[2:]):
        right = images.dtype == np.uint8 and images.shape[1:] == shape and labels.shape == images.shape[:1]
        if not right or (len(labels) and not 0 <= labels.min() <= labels.max() <= 9):
            raise ValueError(
                f"{path} holds {images.dtype} {images.shape} and labels {labels.shape}. Needed: {wanted}, classes 0 to 9."
            )
    return arrays
