"""Numbers in tables: regression of several kinds, mixed columns, a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import dictionaries, generator, loaders, stack
from pipelines.pipeline import Pipeline, classifier, regressor
from torch import Tensor, nn

from lightning_wdefense import ThreatModel

UNBOUNDED = ThreatModel(eps=0.2, bounds=None)


class Regressor(L.LightningModule):
    def __init__(self, outputs: int = 1, inputs: int = 20):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))

    def forward(self, x):
        return self.net(x).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        prediction = self(x)
        self.log("val_mse", F.mse_loss(prediction, y))
        self.log("val_mae", F.l1_loss(prediction, y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class UnitRegressor(Regressor):
    def forward(self, x):
        return torch.sigmoid(self.net(x)).squeeze(-1)


QUANTILES = torch.tensor([0.1, 0.5, 0.9])


class QuantileRegressor(Regressor):
    def __init__(self):
        super().__init__(len(QUANTILES))

    def pinball(self, prediction, y):
        error = y[:, None] - prediction
        return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.pinball(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_pinball", self.pinball(self(x), y))


class OrdinalRegressor(Regressor):
    """Logits of "more than k", for k of 0 to 3."""

    def __init__(self):
        super().__init__(4)

    def training_step(self, batch, batch_idx):
        x, rank = batch
        more = (rank[:, None] > torch.arange(4)).float()
        return F.binary_cross_entropy_with_logits(self(x), more)

    def validation_step(self, batch, batch_idx):
        x, rank = batch
        self.log("val_mae", ((self(x) > 0).sum(1) - rank).abs().float().mean())


class MixedColumns(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.net = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, categories, numbers):
        return self.net(torch.cat([self.embedding(categories), numbers], 1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["categories"], batch["numbers"]), batch["target"])

    def validation_step(self, batch, batch_idx):
        logits = self(batch["categories"], batch["numbers"])
        self.log("val_acc", (logits.argmax(1) == batch["target"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


@dataclass
class Graph:
    """Several graphs as one, as PyTorch Geometric has it."""

    x: Tensor
    edge_index: Tensor
    batch: Tensor
    y: Tensor


class GraphClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, x, edge_index, batch):
        source, target = edge_index
        for layer in (self.first, self.second):
            h = layer(x)
            x = F.relu(h.index_add(0, target, h[source]) / 3)
        pooled = x.new_zeros(int(batch.max()) + 1, x.shape[1]).index_add(0, batch, x)
        return self.head(pooled / NODES)

    def training_step(self, graph, batch_idx):
        logits = self(graph.x, graph.edge_index, graph.batch)
        return F.cross_entropy(logits, graph.y)

    def validation_step(self, graph, batch_idx):
        logits = self(graph.x, graph.edge_index, graph.batch)
        self.log("val_acc", (logits.argmax(1) == graph.y).float().mean(), batch_size=len(graph.y))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


NODES = 6


def table() -> tuple[Tensor, Tensor]:
    """The first column tells the target roughly, with a large amplitude; the others tell it precisely, with a small one."""
    draw = generator()
    y = 2 * torch.randn(800, generator=draw)
    x = 0.15 * y[:, None] + 0.15 * torch.randn(800, 20, generator=draw)
    x[:, 0] = y + 0.5 * torch.randn(800, generator=draw)
    return x, y


def regression_loaders() -> tuple[Any, Any]:
    x, y = table()
    return loaders(x, 10 * y + 50)


def standard_loaders() -> tuple[Any, Any]:
    return loaders(*table())


def unit_loaders() -> tuple[Any, Any]:
    x, y = table()
    return loaders(x, torch.sigmoid(y / 2))


def ordinal_loaders() -> tuple[Any, Any]:
    x, y = table()
    return loaders(x, torch.bucketize(y, torch.tensor([-3.0, -1.0, 1.0, 3.0])))


def mixed_loaders() -> tuple[Any, Any]:
    x, y = table()
    categories = torch.randint(0, 8, (800,), generator=generator(1))
    target = (y + (categories.float() - 3.5) > 0).long()
    return loaders(categories, x, target, collate=dictionaries("categories", "numbers", "target"))


def graph_loaders() -> tuple[Any, Any]:
    draw = generator()
    y = torch.randint(0, 2, (800,), generator=draw)
    x = torch.randn(800, NODES, 8, generator=draw)
    x[:, :, 0] += 1.5 * (2.0 * y[:, None] - 1)
    x[:, :, 1:] += 0.2 * (2.0 * y[:, None, None] - 1)

    def collate(rows: list) -> Graph:
        nodes, labels = stack(rows)
        ring = torch.arange(NODES)
        edges = torch.stack([ring, (ring + 1) % NODES])
        edges = torch.cat([edges, edges.flip(0)], 1)
        index = torch.cat([edges + NODES * graph for graph in range(len(rows))], 1)
        return Graph(nodes.flatten(0, 1), index, torch.arange(len(rows)).repeat_interleave(NODES), labels)

    return loaders(x, y, collate=collate)


def pinball(module: Any, batch: Any, x: Tensor) -> Tensor:
    error = batch[1][:, None] - module.net(x)
    return torch.where(error > 0, QUANTILES * error, (QUANTILES - 1) * error).mean(1)


def ordinal_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    more = (batch[1][:, None] > torch.arange(4)).float()
    return F.binary_cross_entropy_with_logits(module.net(x), more, reduction="none").mean(1)


PIPELINES = [
    regressor("regression", Regressor, regression_loaders, threat=UNBOUNDED, epochs=20, gain=0.41),
    regressor("regression_unit", UnitRegressor, unit_loaders, threat=UNBOUNDED, epochs=15, gain=0.35),
    Pipeline(
        "quantile_regression",
        "regression",
        QuantileRegressor,
        standard_loaders,
        pinball,
        lambda module, batch, x: pinball(module, batch, x).mean().item(),
        threat=UNBOUNDED,
        metric="val_pinball",
        better="lower",
        tolerance=0.15,
        epochs=15,
        gain=0.33,
    ),
    Pipeline(
        "ordinal_regression",
        "regression",
        OrdinalRegressor,
        ordinal_loaders,
        ordinal_loss,
        lambda module, batch, x: ((module.net(x) > 0).sum(1) - batch[1]).abs().float().mean().item(),
        threat=UNBOUNDED,
        metric="val_mae",
        better="lower",
        tolerance=0.15,
        epochs=15,
        gain=0.33,
    ),
    classifier(
        "mixed_columns",
        MixedColumns,
        mixed_loaders,
        logits=lambda module, batch, x: module(batch["categories"], x),
        labels=lambda batch: batch["target"],
        task="tabular",
        clean_inputs=lambda module, batch: batch["numbers"],
        threat=ThreatModel(eps=0.3, bounds=None),
    ),
    classifier(
        "graph",
        GraphClassifier,
        graph_loaders,
        logits=lambda module, batch, x: module(x, batch.edge_index, batch.batch),
        labels=lambda batch: batch.y,
        task="graphs",
        clean_inputs=lambda module, batch: batch.x,
        threat=ThreatModel(eps=0.5, bounds=None),
        gain=0.22,
    ),
]
