"""Find the activation that made a model's outputs, from their autograd graph instead of their values."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_ACTIVATIONS = {"Softmax": "softmax", "SafeSoftmax": "softmax", "Sigmoid": "sigmoid", "Hardsigmoid": "sigmoid"}
# Operations that turn probabilities into probabilities: views, copies, clamps, 1 - p, and means over an ensemble.
_PRESERVE_PROBABILITIES = {
    "Alias", "Cat", "Clamp", "ClampMax", "ClampMin", "Clone", "Expand", "Gather", "Index", "IndexSelect", "Mean", "Permute",
    "ReshapeAlias", "Rsub", "Select", "Slice", "Squeeze", "Stack", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View",
}  # fmt: skip
_UNKNOWN = ("CompiledFunction",)


def activation(outputs: Tensor) -> str | None:
    """The activation that made a tensor: ``"softmax"`` or ``"sigmoid"``; ``""`` for any other operation.

    It is ``None`` if the operation is unknown: there is no autograd graph, or it was compiled.
    """
    found: set[str | None] = set()
    pending: list[Any] = [outputs.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is None:
            # A part without a graph beside others, such as a constant in a cat, is unknown too.
            found.add(None)
            continue
        operation = re.sub(r"Backward\d*$", "", node.name())
        if operation in _PRESERVE_PROBABILITIES:
            pending += [before for before, _ in node.next_functions]
        elif operation.startswith(_UNKNOWN):
            found.add(None)
        else:
            found.add(_ACTIVATIONS.get(operation, ""))
    return found.pop() if len(found) == 1 else None if None in found else ""
