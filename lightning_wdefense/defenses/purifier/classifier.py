"""A purifier and a classifier as one model, so that attacks go through both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_wdefense.defenses.purifier.generators import check_purified


class PurifiedClassifier(nn.Module):
    """``classifier(purifier(inputs))`` as one model, which can be monitored and attacked like any other model.

    Attacks go through both parts, with full gradients. A purifier must be evaluated in this way: purifiers that were evaluated with
    attacks on the classifier alone were later broken by attacks through the purifier (Athalye et al., 2018).

    Args:
        purifier: a :class:`WassersteinPurifier`, whose generator is used, or any module from inputs ``(N, ...)`` to inputs of the
            same shape.
        classifier: any model that takes these inputs.
        bpda: for purifiers that are not differentiable or have no useful gradient (quantisation, JPEG, sampling). The forward pass
            runs the purifier; the backward pass treats it as the identity (backward pass differentiable approximation, BPDA). The
            outputs do not change.

    Raises:
        TypeError: in the forward pass, if the purifier returns no tensor.
        ValueError: in the forward pass, if the purifier changes the shape.

    References:
        Athalye, Carlini, Wagner, "Obfuscated gradients give a false sense of security", ICML 2018.

    Example:
        >>> model = PurifiedClassifier(nn.Hardtanh(0, 1), nn.Linear(4, 3))
        >>> model(torch.rand(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, purifier: nn.Module, classifier: nn.Module, *, bpda: bool = False) -> None:
        super().__init__()
        # A WassersteinPurifier contains a classifier of its own, which is not used here.
        inner = getattr(purifier, "purified", None)
        self.purifier: nn.Module = inner.purifier if isinstance(inner, PurifiedClassifier) else purifier
        self.classifier, self.bpda = classifier, bpda

    def purify(self, inputs: Tensor) -> Tensor:
        """The purified inputs ``(N, ...)``. With ``bpda`` their gradient is passed to the inputs unchanged."""
        if not self.bpda:
            return check_purified(self.purifier(inputs), inputs)
        with torch.no_grad():
            purified = check_purified(self.purifier(inputs), inputs)
        return _StraightThrough.apply(inputs, purified.to(inputs.dtype))

    def forward(self, inputs: Tensor) -> Any:
        """The classifier's outputs on the purified inputs."""
        return self.classifier(self.purify(inputs))

    def extra_repr(self) -> str:
        """Whether the gradient is that of BPDA."""
        return f"bpda={self.bpda}"


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, purified: Tensor) -> Tensor:  # type: ignore[override]
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
