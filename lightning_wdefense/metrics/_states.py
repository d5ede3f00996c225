"""States of metrics that are lists of tensors."""

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat


def concatenated(parts: Tensor | list[Tensor], device: torch.device) -> Tensor:
    """All values of a state, ``(N,)``: of one tensor after a reduction over ranks, of several before; empty before any update."""
    return dim_zero_cat(parts) if len(parts) else torch.empty(0, device=device)
