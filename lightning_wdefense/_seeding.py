"""Random numbers that depend only on given integers, such as (seed, batch, rank), so that a resumed run draws the same ones."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator

import torch

from lightning_wdefense._locks import locked


def seeded_generator(device: torch.device, *place: int) -> torch.Generator:
    """A random generator seeded with integers such as (seed, epoch, batch, rank); other integers give other noise.

    Args:
        device: device of the generator.
        place: the integers.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(place)}q", *place), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


_GLOBAL_RANDOM_STATE = object()


def locked_random_state() -> contextlib.AbstractContextManager[None]:
    """Lock: inside the context, no other thread of this package seeds the global random states."""
    return locked([_GLOBAL_RANDOM_STATE])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's global random state inside the context, for example to initialise layers, and restore it afterwards."""
    with locked_random_state(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators as well
        yield
