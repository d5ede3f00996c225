"""A purifier in front of a classifier, as one model, which is how it is to be attacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.defenses.purifier.generators import check_purified


class PurifiedClassifier(nn.Module):
    """``classifier(purifier(inputs))`` as one model: use it, monitor it and attack it like any other.

    Attacks go through both, with full gradients. There is no other way to judge a purifier: every one that was published on the strength
    of attacks on the classifier alone fell to attacks that went through it (Athalye et al., 2018).

    Args:
        purifier: a :class:`WassersteinPurifier`, whose generator is taken, or any module from inputs ``(N, ...)`` to inputs of the same shape.
        classifier: any model of the inputs.
        bpda: for purifiers that are not differentiable, or hide their gradient (quantisation, JPEG, sampling): run forward through the
            purifier, and backward as if it were the identity (backward pass differentiable approximation). The outputs are the same.

    Raises:
        TypeError: in use, if the purifier returns no tensor.
        ValueError: in use, if it changes the shape.

    References:
        Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018.

    Example:
        >>> model = PurifiedClassifier(nn.Hardtanh(0, 1), nn.Linear(4, 3))
        >>> model(torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, purifier: nn.Module, classifier: nn.Module, *, bpda: bool = False) -> None:
        super().__init__()
        # A WassersteinPurifier holds a classifier of its own, which has no place in here.
        inner = getattr(purifier, "purified", None)
        self.purifier: nn.Module = inner.purifier if isinstance(inner, PurifiedClassifier) else purifier
        self.classifier, self.bpda = classifier, bpda

    def purify(self, inputs: Tensor) -> Tensor:
        """The purified inputs ``(N, ...)``; with ``bpda`` their gradient is that of the inputs themselves."""
        if not self.bpda:
            return check_purified(self.purifier(inputs), inputs)
        with torch.no_grad():
            purified = check_purified(self.purifier(inputs), inputs)
        return _StraightThrough.apply(inputs, purified.to(inputs.dtype))

    def forward(self, inputs: Tensor) -> Any:
        """The classifier's outputs on the purified inputs."""
        return self.classifier(self.purify(inputs))

    def extra_repr(self) -> str:
        """How its gradient is taken."""
        return f"bpda={self.bpda}"


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, purified: Tensor) -> Tensor:  # type: ignore[override]
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
