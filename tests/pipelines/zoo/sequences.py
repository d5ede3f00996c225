"""Sequences of numbers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import generator, loaders, stack
from pipelines.pipeline import Pipeline, classifier, regressor
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_wdefense import ThreatModel

UNBOUNDED = ThreatModel(eps=0.2, bounds=None)


class Forecaster(L.LightningModule):
    """The next two values of a series."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 2)

    def forward(self, x):
        _, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1])

    def training_step(self, batch, batch_idx):
        past, future = batch
        loss = F.mse_loss(self(past), future)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        past, future = batch
        self.log("val_mse", F.mse_loss(self(past), future))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}


class PaddedConvolution(L.LightningModule):
    """Signals of several lengths, padded with zeros, with their lengths beside them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(2, 24, 5, padding=2), nn.ReLU(), nn.Conv1d(24, 24, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(24, 3)

    def forward(self, x, lengths):
        mask = (torch.arange(x.shape[2]) < lengths[:, None])[:, None].float()
        return self.head((self.conv(x) * mask).sum(2) / lengths[:, None])

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        return F.cross_entropy(self(x, lengths), y)

    def validation_step(self, batch, batch_idx):
        x, lengths, y = batch
        self.log("val_acc", (self(x, lengths).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


class Transcriber(L.LightningModule):
    """CTC: reads symbols off a strip of frames."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 32, batch_first=True, bidirectional=True), nn.Linear(64, 5)
        self.ctc = nn.CTCLoss(zero_infinity=True)

    def forward(self, frames):
        return self.head(self.rnn(frames)[0]).log_softmax(-1)

    def loss(self, log_p, symbols):
        frames = torch.full((len(log_p),), log_p.shape[1])
        lengths = torch.full((len(symbols),), symbols.shape[1])
        return self.ctc(log_p.transpose(0, 1), symbols, frames, lengths)

    def training_step(self, batch, batch_idx):
        frames, symbols = batch
        return self.loss(self(frames), symbols)

    def validation_step(self, batch, batch_idx):
        frames, symbols = batch
        log_p = self(frames)
        self.log("val_ctc", self.loss(log_p, symbols))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def series_loaders() -> tuple[Any, Any]:
    draw = generator()
    phase, speed = 6.3 * torch.rand(800, 1, generator=draw), 0.3 + 0.4 * torch.rand(800, 1, generator=draw)
    values = torch.sin(phase + speed * torch.arange(16)) + 0.1 * torch.randn(800, 16, generator=draw)
    return loaders(values[:, :14, None], values[:, 14:])


def signal_loaders() -> tuple[Any, Any]:
    draw = generator()
    y = torch.randint(0, 3, (800,), generator=draw)
    wave = torch.sin((0.5 + 0.3 * y[:, None]) * torch.arange(24) + 6.3 * torch.rand(800, 1, generator=draw))
    x = 0.7 * wave[:, None] + 0.4 * torch.randn(800, 2, 24, generator=draw)
    lengths = torch.randint(12, 25, (800,), generator=draw)

    def collate(rows: list) -> Any:
        x, lengths, y = stack(rows)
        padded = pad_sequence([row[:, :length].T for row, length in zip(x, lengths, strict=True)], batch_first=True)
        return padded.transpose(1, 2).contiguous(), lengths, y

    return loaders(x, lengths, y, collate=collate)


def strip_loaders() -> tuple[Any, Any]:
    draw = generator()
    symbols = torch.randint(1, 5, (800, 3), generator=draw)
    frames = F.one_hot(symbols.repeat_interleave(3, 1), 6).float()
    frames[:, ::3] = F.one_hot(torch.tensor(0), 6).float()
    return loaders(frames + 0.3 * torch.randn(frames.shape, generator=draw), symbols)


def ctc(module: Any, batch: Any, x: Tensor) -> Tensor:
    symbols = batch[1]
    lengths = torch.full((len(x),), 9), torch.full((len(x),), 3)
    return F.ctc_loss(module(x).transpose(0, 1), symbols, *lengths, reduction="none") / 3


PIPELINES = [
    regressor("forecasting", Forecaster, series_loaders, task="time series", threat=UNBOUNDED, epochs=15, gain=0.23),
    classifier(
        "padded_lengths",
        PaddedConvolution,
        signal_loaders,
        logits=lambda module, batch, x: module(x, batch[1]),
        labels=lambda batch: batch[2],
        task="time series",
        threat=UNBOUNDED,
        epochs=12,
        gain=0.15,
    ),
    Pipeline(
        "ctc",
        "speech",
        Transcriber,
        strip_loaders,
        ctc,
        lambda module, batch, x: ctc(module, batch, x).mean().item(),
        threat=UNBOUNDED,
        metric="val_ctc",
        better="lower",
        tolerance=0.15,
        epochs=12,
        gain=0.23,
    ),
]
