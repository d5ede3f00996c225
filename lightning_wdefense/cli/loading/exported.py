"""Models in files of ``torch.export``."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_wdefense.cli.usage import UsageError


class ExportedModel(nn.Module):
    """A model from a file that ``torch.export.save`` wrote.

    What was exported in training mode stays in it: call ``eval()`` before the export. PyTorch's own loader of these files can run code
    in them, so load files that you trust. A program that was exported for one batch size gets batches of this size: larger ones in
    parts, the last part filled up with copies of its last sample. A dynamic batch dimension costs less, because attacks run parts of
    batches.

    Args:
        path: the file.
        device: where it runs; ``None`` for where it was exported.

    Raises:
        UsageError: if there is no such file, it is no exported program, or the program does not take one tensor.
    """

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        super().__init__()
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file.")
        logging.disable(logging.WARNING)  # what goes wrong inside of torch.export.load, at length
        try:
            program = torch.export.load(str(path))
        except Exception as error:  # torch.export.load has many
            raise UsageError(
                f"{path} is no file of torch.export, or of a newer one. This writes one: "
                "torch.export.save(torch.export.export(model.eval(), (inputs,)), 'model.pt2')."
            ) from error
        finally:
            logging.disable(logging.NOTSET)
        if device is not None and any(tensor.device != device for tensor in program.state_dict.values()):
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        self.batch_size = _fixed_batch_size(program, path)
        self.program = program.module()
        self._digest = hashlib.sha256(str(program.graph).encode()).hexdigest()[:16]

    def forward(self, inputs: Tensor) -> Any:
        """The outputs of the program for inputs ``(N, ...)``, for any N."""
        size = self.batch_size
        if size is None or len(inputs) == size:
            return self.program(inputs)
        outputs = [self._filled_up(part, size) for part in inputs.split(size)]
        return tree_map(lambda *parts: torch.cat(parts), outputs[0], *outputs[1:])

    def _filled_up(self, part: Tensor, size: int) -> Any:
        missing = size - len(part)
        filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
        return tree_map(lambda each: each[: len(part)], self.program(filled))

    def extra_repr(self) -> str:
        """What tells it from another program with the same weights."""
        return f"graph={self._digest}, batch_size={self.batch_size}"


def _fixed_batch_size(program: Any, path: Path) -> int | None:
    """The only batch size that a program takes; ``None`` if it takes any."""
    names = program.graph_signature.user_inputs
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder" and node.name in names and isinstance(node.meta.get("val"), Tensor)]  # fmt: skip
    if len(shapes) != 1 or not len(shapes[0]):
        raise UsageError(f"{path}: the program takes {len(shapes)} tensors, but must take one, the inputs of a batch.")
    size = shapes[0][0]
    return int(size) if isinstance(size, int) else None
