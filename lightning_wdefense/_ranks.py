"""The processes (ranks) that train one model together: means over them, and samples gathered from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks of torch.distributed's default process group; by default one process alone.

    Every method that communicates must be called by all ranks, in the same order.

    Args:
        size: number of ranks.
        rank: this rank.
    """

    size: int = 1
    rank: int = 0

    @classmethod
    def current(cls) -> Ranks:
        """All ranks if torch.distributed has a process group, otherwise this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_world_size(), dist.get_rank())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, without a gradient. All ranks get the same bits."""
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, without a gradient."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor.detach()

    def mean_of_samples(self, mean: Tensor, samples: int) -> Tensor:
        """The mean over the samples of all ranks, from this rank's mean (a scalar) and its number of samples."""
        if self.size == 1:
            return mean.detach()
        own = mean.detach() * samples if samples else torch.zeros_like(mean)
        total, count = self.sum(torch.stack([own, own.new_tensor(float(samples))]))
        return total / count

    def mean_of_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means of several tensors over all ranks, in one message for each dtype."""
        return list(tensors) if self.size == 1 else in_messages(tensors, self.mean)

    def any(self, condition: bool, device: torch.device | None = None) -> bool:
        """Whether a condition holds on any rank."""
        return condition if self.size == 1 else bool(self.sum(torch.tensor(float(condition), device=device)) > 0)

    def numbers(self, value: float, device: torch.device | None = None) -> list[float]:
        """A number of each rank."""
        if self.size == 1:
            return [value]
        mine = torch.zeros(self.size, device=device, dtype=torch.float64 if device is None else torch.float32)
        mine[self.rank] = value
        return [float(each) for each in self.sum(mine)]

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows ``(N, ...)`` of all ranks, in the order of the ranks, with a gradient in this rank's own rows only.

        Args:
            rows: ``(N_r, ...)`` on rank r. ``N_r`` may be zero, and may differ by rank.
            sizes: ``N_r`` of each rank, see :meth:`row_counts`.
        """
        if self.size == 1:
            return rows
        largest = max(sizes)
        own = rows.detach().contiguous()
        # Messages of equal sizes, because gloo takes no others.
        if len(own) < largest:
            own = torch.cat([own, own.new_zeros(largest - len(own), *own.shape[1:])])
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        kept: list[Any] = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        kept[self.rank] = rows
        return torch.cat(kept)

    def row_counts(self, rows: Tensor) -> list[int]:
        """The number of rows of each rank."""
        return [round(count) for count in self.numbers(len(rows), rows.device)]


def in_messages(tensors: Sequence[Tensor], send: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What ``send`` makes of several tensors, which it gets flattened into one vector for each dtype."""
    sent: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = send(torch.cat([tensor.flatten() for tensor in alike]))
        sent[dtype] = iter(flat.split([tensor.numel() for tensor in alike]))
    return [next(sent[tensor.dtype]).view_as(tensor) for tensor in tensors]


ALONE = Ranks()
"""One process that trains by itself."""


def rows_of(rank: int, sizes: Sequence[int]) -> slice:
    """Where the rows of a rank are among the gathered ones."""
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
