"""Text: token ids have no gradient, their embeddings have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import dictionaries, generator, loaders
from pipelines.pipeline import classifier
from torch import Tensor, nn

from lightning_wdefense import ThreatModel

WORDS, LENGTH, PADDING = 40, 12, 0


class BagOfEmbeddings(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.emb, self.net = nn.Embedding(WORDS, 16), nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, ids):
        return self.net(self.emb(ids).mean(1))

    def training_step(self, batch, batch_idx):
        ids, y = batch
        return F.cross_entropy(self(ids), y)

    def validation_step(self, batch, batch_idx):
        ids, y = batch
        self.log("val_acc", (self(ids).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@dataclass
class TextOutput:
    loss: Tensor
    logits: Tensor


class Encoder(nn.Module):
    """In the style of Hugging Face."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(WORDS, 16, padding_idx=PADDING)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.classifier = nn.Linear(16, 2)

    def encode(self, embedded, attention_mask):
        mask = attention_mask[..., None].float()
        hidden = self.layer(embedded, src_key_padding_mask=attention_mask == 0)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))

    def forward(self, input_ids, attention_mask, labels):
        logits = self.encode(self.embeddings(input_ids), attention_mask)
        return TextOutput(F.cross_entropy(logits, labels), logits)


class TextClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Encoder()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        output = self.model(**batch)
        self.log_dict({"val_loss": output.loss, "val_acc": (output.logits.argmax(1) == batch["labels"]).float().mean()})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 5e-3)


def sentences() -> tuple[Tensor, Tensor]:
    """Words of even or odd number are more frequent by class."""
    draw = generator()
    y = torch.randint(0, 2, (800,), generator=draw)
    ids = torch.randint(1, WORDS // 2, (800, LENGTH), generator=draw) * 2
    swap = torch.rand(800, LENGTH, generator=draw) < torch.where(y == 1, 0.75, 0.25)[:, None]
    return ids - swap.long(), y


def sentence_loaders() -> tuple[Any, Any]:
    return loaders(*sentences())


def padded_loaders() -> tuple[Any, Any]:
    ids, y = sentences()
    lengths = torch.randint(6, LENGTH + 1, (800, 1), generator=generator(1))
    mask = (torch.arange(LENGTH) < lengths).long()
    return loaders(ids * mask, mask, y, collate=dictionaries("input_ids", "attention_mask", "labels"))


PIPELINES = [
    classifier(
        "token_ids",
        BagOfEmbeddings,
        sentence_loaders,
        logits=lambda module, batch, x: module.net(x.mean(1)),
        task="text",
        clean_inputs=lambda module, batch: module.emb(batch[0]),
        epochs=15,
        threat=ThreatModel(eps=0.15, bounds=None),
        arguments={"perturb": "emb"},
    ),
    classifier(
        "token_classifier",
        TextClassifier,
        padded_loaders,
        logits=lambda module, batch, x: module.model.encode(x, batch["attention_mask"]),
        labels=lambda batch: batch["labels"],
        task="text",
        clean_inputs=lambda module, batch: module.model.embeddings(batch["input_ids"]),
        threat=ThreatModel("l2", eps=1.5, bounds=None),
        arguments={"perturb": "model.embeddings"},
        gain=0.15,
    ),
]
