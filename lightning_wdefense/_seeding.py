"""Noise that depends on where a run stands and on nothing else, so that a resumed run draws it again."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator

import torch

from lightning_wdefense._locks import locked


def seeded_generator(device: torch.device, *place: int) -> torch.Generator:
    """A generator seeded by integers, such as (seed, epoch, batch, rank); other integers, other noise."""
    digest = hashlib.blake2b(struct.pack(f"<{len(place)}q", *place), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


_GLOBAL_RANDOM_STATE = object()


def locked_random_state() -> contextlib.AbstractContextManager[None]:
    """Inside, no other thread seeds the global random states for code of ours that draws from them."""
    return locked([_GLOBAL_RANDOM_STATE])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU are seeded inside, as those of layers that are made; the global random state is afterwards as it was."""
    with locked_random_state(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        yield
