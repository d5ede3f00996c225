"""Set PyTorch's default dtype for a while, safely among threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lightning_wdefense._locks import locked


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make this dtype the default for new tensors inside the context. Lightning's "true" precisions change the default too.

    The default belongs to the whole process. While a thread has changed it here, other threads that want to change it
    wait.
    """
    if torch.get_default_dtype() == dtype:
        yield
        return
    with locked([torch.set_default_dtype]):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
