"""What a module must be for our callbacks."""

from __future__ import annotations

from torch import nn

from lightning_wdefense._compat import LightningModule, MisconfigurationException
from lightning_wdefense.modules.recording import submodule


def attacked_model(pl_module: LightningModule, path: str | None) -> nn.Module:
    """The module itself, or its submodule at ``path``.

    Raises:
        ValueError: if there is none, with the nearest ones, or the module itself has no ``forward``.
    """
    if path is not None:
        return submodule(pl_module, path, "model")
    if getattr(pl_module.forward, "__qualname__", "") == "LightningModule.forward":
        children = ", ".join(repr(name) for name, _ in pl_module.named_children()) or "none"
        raise ValueError(
            f"{type(pl_module).__name__} has no forward: name the submodule that takes the inputs and returns logits with "
            f"model=. Its submodules: {children}."
        )
    return pl_module


def check_automatic_optimization(pl_module: LightningModule) -> None:
    """Refuse manual optimisation, which ignores the loss that ``training_step`` returns.

    Raises:
        MisconfigurationException: naming the mixin.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "WassersteinDefense adds to the loss that training_step returns, which manual optimisation ignores: let "
            f"{type(pl_module).__name__} inherit WassersteinDefenseMixin and call self.defend(inputs, labels) instead."
        )
