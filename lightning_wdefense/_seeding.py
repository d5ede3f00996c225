"""Noise that depends on where a run stands and on nothing else, so that a resumed run draws it again."""

from __future__ import annotations

import hashlib
import struct

import torch


def seeded_generator(device: torch.device, *place: int) -> torch.Generator:
    """A generator seeded by integers, such as (seed, epoch, batch, rank); other integers, other noise."""
    digest = hashlib.blake2b(struct.pack(f"<{len(place)}q", *place), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
