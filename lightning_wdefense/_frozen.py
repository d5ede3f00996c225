"""Switch off gradients with respect to a module's parameters for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_wdefense._locks import locked


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to ``False`` inside the context, and restore each parameter's own flag afterwards.

    Gradients with respect to the module's inputs are still computed. Other threads that want to freeze or isolate the
    module wait.
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
