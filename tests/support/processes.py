"""Process groups of gloo that are left in good order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def group_ends() -> Iterator[None]:
    """A process group that is made inside, by whomever, is left at the end by all processes together.

    A group that lives on when the interpreter ends has threads that may still hold the tensors of the last collective. To free them
    they need the interpreter; where that has gone the process aborts with "terminate called without an active exception". Lightning
    leaves groups of gloo to that end.
    """
    try:
        yield
        dist.barrier()  # not after an error: the others may never get there
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
