"""Checks that a module can be attacked and trained by the callbacks, with errors that say what to change."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_wdefense._compat import LightningModule, MisconfigurationException
from lightning_wdefense.modules.recording import find_submodule


def attacked_model(pl_module: LightningModule, path: str | None, *, needs_forward: bool = True) -> nn.Module:
    """The module itself, or its submodule at ``path``.

    Raises:
        ValueError: if there is no such submodule (the message lists the nearest names), or the module itself has no ``forward``.
    """
    if path is not None:
        return find_submodule(pl_module, path, "model")
    if needs_forward and getattr(pl_module.forward, "__qualname__", "") == "LightningModule.forward":
        children = ", ".join(repr(name) for name, _ in pl_module.named_children()) or "none"
        raise ValueError(
            f"{type(pl_module).__name__} has no forward method. Name the submodule that takes the inputs and returns logits with "
            f"model=. Its submodules: {children}."
        )
    return pl_module


def check_automatic_optimization(pl_module: LightningModule) -> None:
    """Raise an error for manual optimisation, which ignores the loss that ``training_step`` returns.

    Raises:
        MisconfigurationException: if the module uses manual optimisation; the message names the mixin.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "WassersteinDefense adds terms to the loss that training_step returns, but manual optimisation ignores this loss: let "
            f"{type(pl_module).__name__} inherit WassersteinDefenseMixin and call self.defend(inputs, labels) instead."
        )


def check_returns_loss(step: Callable[..., Any]) -> None:
    """Raise an error for a step whose code returns nothing, or that takes its batches from an iterator.

    Raises:
        MisconfigurationException: if the step is of either kind; the message says what to change.
    """
    function = inspect.unwrap(getattr(step, "__func__", step))
    if "dataloader_iter" in inspect.signature(function).parameters:
        raise MisconfigurationException(
            "training_step(self, dataloader_iter) takes its batches from an iterator, so the attack cannot call it twice on the same batch: "
            "write training_step(self, batch, batch_idx)."
        )
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made at run time
        return
    if isinstance(tree.body[0], ast.FunctionDef) and not any(map(_returns, tree.body[0].body)):
        raise MisconfigurationException(
            f"{getattr(function, '__qualname__', 'training_step')} returns nothing, so there is no loss for the adversary to maximise (and none "
            "for Lightning to minimise): return the loss as a tensor, or as the 'loss' of a dictionary."
        )


def _returns(node: ast.AST) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        return False
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.Return):
        return not (node.value is None or (isinstance(node.value, ast.Constant) and node.value.value is None))
    return any(map(_returns, ast.iter_child_nodes(node)))
