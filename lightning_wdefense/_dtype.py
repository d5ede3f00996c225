"""The dtype of new tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lightning_wdefense._locks import locked


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this dtype inside. Lightning's "true" precisions change the default as well.

    The default is one of the process: where it is another one, threads that want this one or yet another wait for each other.
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
