"""Save and restore the global random states, so that the same code draws the same numbers again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves


class RandomState:
    """The current random states of Python, numpy, the CPU and a device.

    Args:
        device: the device that the module runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator: Any = None if device.type in ("cpu", "meta") else getattr(torch, device.type)
        self._device = device
        self._states = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            None if self._accelerator is None else self._accelerator.get_rng_state(device),
        )

    @property
    def drawn(self) -> bool:
        """Whether random numbers were drawn since then."""
        now = RandomState(self._device)
        return not all(map(np.array_equal, tree_leaves(self._states), tree_leaves(now._states)))

    def restore(self) -> None:
        """Restore the saved random states."""
        python, numpy, cpu, accelerator = self._states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator is not None:
            self._accelerator.set_rng_state(accelerator, self._device)
