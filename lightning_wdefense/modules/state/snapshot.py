"""Save the values of tensors, and restore those that were written to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class TensorSnapshot:
    """The saved value of a tensor.

    A write is detected by the tensor's version counter. ``batch_norm`` writes to running statistics without a new
    version, but increments the number of batches, which is checked too.

    Args:
        tensor: the tensor; no autograd graph made it.
        count: the ``num_batches_tracked`` of the tensor, if it is a running statistic.
    """

    def __init__(self, tensor: Tensor, count: Tensor | None = None) -> None:
        self.value = tensor.detach().clone()
        self._tensor, self._count, self._required = tensor, count, tensor.requires_grad
        self._note()

    @property
    def written(self) -> bool:
        """Whether the tensor was written to since then."""
        return self._versions != self._now()

    def restore(self) -> None:
        """Restore the tensor's value."""
        tensor = self._tensor
        if tensor._version == self._versions[0]:
            tensor.data.copy_(
                self.value
            )  # without a new version, as batch_norm wrote: graphs that saved the tensor stay valid
            return
        parameter = isinstance(tensor, nn.Parameter) and tensor.is_leaf  # whose requires_grad is restored elsewhere
        if tensor.requires_grad and not self._required and not parameter and not tensor._is_view():
            tensor.detach_()  # the written value had a graph
        tensor.copy_(self.value)

    def _note(self) -> None:
        self._versions = self._now()

    def _now(self) -> tuple[int, int]:
        return self._tensor._version, 0 if self._count is None else self._count._version


def restore_written(kept: Iterable[TensorSnapshot]) -> None:
    """Restore the tensors that were written to. The others are not touched, since graphs may have saved them for their backward pass."""
    written = [each for each in kept if each.written]
    with torch.no_grad():
        for each in written:
            each.restore()
    for each in written:  # after the counts are restored too
        each._note()


def batch_count(module: nn.Module, name: str) -> Tensor | None:
    """The ``num_batches_tracked`` of a buffer that is a running statistic; ``None`` for other buffers."""
    if isinstance(module, nn.modules.batchnorm._NormBase) and name in ("running_mean", "running_var"):
        return module.num_batches_tracked
    return None
