"""Pipelines that can't be defended as they are, and what the error says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pipelines.data import digit_loaders
from pipelines.pipeline import Pipeline
from pipelines.zoo.batches import TwoLoaders, two_train_loaders
from pipelines.zoo.classification import FrozenBackbone, Plain
from pipelines.zoo.tokens import BagOfEmbeddings, sentence_loaders

from lightning_wdefense import ThreatModel


class NoLoss(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        self.log("train_acc", (self(x).argmax(1) == y).float().mean())


class Detached(FrozenBackbone):
    def forward(self, x):
        with torch.no_grad():
            features = self.backbone(x)
        return self.net(features)


class SecondDraw(Plain):
    """Draws its second batch by itself."""

    def on_train_start(self):
        self.more = iter([batch for _ in range(20) for batch in digit_loaders()[0]])

    def training_step(self, batch, batch_idx):
        x, y = batch
        other, label = next(self.more)
        return F.cross_entropy(self(x), y) + F.cross_entropy(self(other), label)


TEXT = ThreatModel(eps=0.1, bounds=None)

PIPELINES = [
    Pipeline("no_loss", "classification", NoLoss, digit_loaders, refused="loss"),
    Pipeline("detached_inputs", "classification", Detached, digit_loaders, refused="(?s)depend.*(no_grad|detach)"),
    Pipeline("integer_inputs", "text", BagOfEmbeddings, sentence_loaders, threat=TEXT, refused="perturb="),
    Pipeline("consumed_iterator", "classification", SecondDraw, digit_loaders, refused="(?i)iterator"),
    Pipeline(
        "inputs_nowhere",
        "classification",
        TwoLoaders,
        two_train_loaders,
        arguments={"inputs": "a.9"},
        refused=r"(?s)a\.9.*a\.0.*b\.0",
    ),
    Pipeline(
        "perturb_nowhere",
        "text",
        BagOfEmbeddings,
        sentence_loaders,
        threat=TEXT,
        arguments={"perturb": "encoder.embeddings"},
        refused="(?s)encoder.embeddings.*emb",
    ),
]
