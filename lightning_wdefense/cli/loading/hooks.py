"""Methods of Lightning's classes that a user has written anew."""

from __future__ import annotations

from typing import Any

from lightning_wdefense.cli.usage import note

TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
"""What the Trainer does with a batch before the step."""


def overrides(owner: Any, method: str) -> bool:
    """Whether a LightningModule or LightningDataModule has a method of its own, and not Lightning's, which raises or does nothing."""
    place = getattr(getattr(type(owner), method, None), "__module__", "")
    return method in vars(owner) or not str(place).startswith(("lightning.pytorch.", "pytorch_lightning.", "torch."))


def note_of_hooks(owner: Any) -> None:
    """Tell which of the hooks that change batches are not run."""
    for method in TRANSFER:
        if overrides(owner, method):
            note(
                f"{method}() of {type(owner).__name__} is not run: batches reach the model as the dataloader gives them."
            )
