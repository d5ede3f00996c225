"""Inputs as PNG files, written without a library."""

from __future__ import annotations

import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.evaluation.details.examples import Example

CHANNELS = (1, 3, 4)
"""Numbers of channels that an image may have: grey, RGB, or RGB and one more, which is not shown."""

MAX_SIDE = 256
"""Height and width (pixels) beyond which an image is made smaller."""

GREY, RGB = 0, 2
"""Colour types of PNG."""


def is_image(inputs: Tensor) -> bool:
    """Whether an input ``(...)`` is an image ``(C, H, W)``."""
    return inputs.ndim == 3 and inputs.shape[0] in CHANNELS and min(inputs.shape[1:]) > 1


def images_of(example: Example, threat: ThreatModel) -> tuple[tuple[bytes, str], ...]:
    """The clean input, the adversarial one, and their difference around grey, amplified so that the largest change is black or white."""
    low, high = threat.bounds or (float(example.inputs.min()), float(example.inputs.max()))
    span = (high - low) or 1.0
    delta = example.attacked - example.inputs
    largest = float(delta.abs().max())
    factor = span / (2 * largest) if largest > 0 else 0.0
    named = f"change × {factor:.2g}" if factor else "no change"
    panels = ((example.inputs - low) / span, (example.attacked - low) / span, 0.5 + delta * factor / span)
    return tuple(zip(map(png, panels), ("clean", "attacked", named), strict=True))


def png(image: Tensor) -> bytes:
    """An image ``(C, H, W)`` with values in [0, 1] as a PNG file."""
    image = image.float().nan_to_num(0.5)[:3]
    side = max(image.shape[1:])
    if side > MAX_SIDE:
        image = F.interpolate(image[None], scale_factor=MAX_SIDE / side, mode="area")[0]
    channels, height, width = image.shape
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).reshape(height, -1)
    filters = pixels.new_zeros(height, 1)  # the filter of each row: none
    header = struct.pack(">IIBBBBB", width, height, 8, GREY if channels == 1 else RGB, 0, 0, 0)
    data = zlib.compress(torch.cat([filters, pixels], 1).numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
