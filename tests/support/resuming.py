"""Batches that go on where a checkpoint stands, also if it was written in the middle of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumingBatches(Sampler[list[int]]):
    """Shuffled batches of indices. The order depends on the seed and the epoch, the first batch on what the trainer has processed."""

    def __init__(self, trainer: L.Trainer, samples: int, batch_size: int, seed: int = 0) -> None:
        self.trainer, self.samples, self.batch_size, self.seed = trainer, samples, batch_size, seed

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.trainer.current_epoch)
        batches = torch.randperm(self.samples, generator=generator).split(self.batch_size)
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        yield from (batch.tolist() for batch in batches[done % len(self) :])


class ResumingData(L.LightningDataModule):
    """A dataset for training, in batches that go on where a checkpoint stands, and a dataloader for validation."""

    def __init__(self, train: Dataset, validation: DataLoader, batch_size: int) -> None:
        super().__init__()
        self.train, self.validation, self.batch_size = train, validation, batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_sampler=ResumingBatches(self.trainer, len(self.train), self.batch_size))

    def val_dataloader(self) -> DataLoader:
        return self.validation
