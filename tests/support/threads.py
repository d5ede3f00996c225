"""Threads that get in each other's way as often as they can, and whose arithmetic is the same to the last bit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def one_core_each(workers: int) -> ThreadPoolExecutor:
    """A pool in which operations do not split.

    How many cores a product of MKL takes, and so its last bits, depends in a new thread on what ran there before, and on the load.
    """
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


@contextlib.contextmanager
def restless(interval: float) -> Iterator[None]:
    """Inside, threads take turns every ``interval`` seconds, and operations of this one do not split either."""
    before, cores = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(interval)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        torch.set_num_threads(cores)
