"""A module as a function of its inputs alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_wdefense._locks import locked


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, the module is differentiated with respect to its inputs alone; each parameter's own flag comes back.

    Other threads that would freeze or isolate it wait.
    """
    with locked(module.modules()):
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
