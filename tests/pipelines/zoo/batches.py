"""Classifiers of digits whose batches and outputs have a form of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from pipelines.data import dictionaries, digit_loaders, generator, loaders, stack
from pipelines.pipeline import Pipeline, accuracy, classifier
from pipelines.zoo.classification import Plain, mlp
from support.lightning_modules import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader


class DictBatch(Plain):
    def _step(self, batch, stage):
        logits = self(batch["image"])
        self.log(f"{stage}_acc", (logits.argmax(1) == batch["label"]).float().mean(), batch_size=len(logits))
        return F.cross_entropy(logits, batch["label"])

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self._step(batch, "val")


class DictOutput(Plain):
    def forward(self, x):
        return {"out": self.net(x)}

    def _step(self, batch, stage):
        x, y = batch
        out = self(x)["out"]
        self.log(f"{stage}_acc", (out.argmax(1) == y).float().mean())
        return F.cross_entropy(out, y)

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self._step(batch, "val")


class TupleOutput(DictOutput):
    """Logits and features."""

    def forward(self, x):
        features = self.net[:3](x)
        return self.net[3](features), features

    def _step(self, batch, stage):
        x, y = batch
        logits, features = self(x)
        self.log(f"{stage}_acc", (logits.argmax(1) == y).float().mean())
        return F.cross_entropy(logits, y) + 1e-4 * features.square().mean()


class KeywordForward(Plain):
    """``self(**batch)``."""

    def forward(self, pixel_values, labels=None):
        return self.net(pixel_values)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(**batch), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(**batch).argmax(1) == batch["labels"]).float().mean())


@dataclass
class ModelOutput:
    loss: Tensor | None
    logits: Tensor


class ForwardComputesLoss(Plain):
    """In the style of Hugging Face: the loss comes out of the model."""

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return ModelOutput(None if labels is None else F.cross_entropy(logits, labels), logits)

    def training_step(self, batch, batch_idx):
        output = self(**batch)
        self.log("train_loss", output.loss)
        return output.loss

    def validation_step(self, batch, batch_idx):
        output = self(**batch)
        self.log("val_loss", output.loss)
        self.log("val_acc", (output.logits.argmax(1) == batch["labels"]).float().mean())


class ForwardOfTwo(Plain):
    """``forward(x, meta)``."""

    def __init__(self):
        super().__init__()
        self.meta = nn.Linear(3, 10)

    def forward(self, x, meta):
        return self.net(x) + self.meta(meta)

    def training_step(self, batch, batch_idx):
        x, meta, y = batch
        return F.cross_entropy(self(x, meta), y)

    def validation_step(self, batch, batch_idx):
        x, meta, y = batch
        self.log("val_acc", (self(x, meta).argmax(1) == y).float().mean())


class NestedInputs(ForwardOfTwo):
    """``((x, meta), y)``."""

    def training_step(self, batch, batch_idx):
        (x, meta), y = batch
        return F.cross_entropy(self(x, meta), y)

    def validation_step(self, batch, batch_idx):
        (x, meta), y = batch
        self.log("val_acc", (self(x, meta).argmax(1) == y).float().mean(), batch_size=len(y))


class TwoLoaders(Plain):
    """A dictionary of two loaders' batches."""

    def training_step(self, batch, batch_idx):
        return sum(F.cross_entropy(self(x), y) for x, y in batch.values())

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())


class UnlabelledSecond(Plain):
    """A second validation loader has no labels."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 0:
            x, y = batch
            self.log("val_acc", (self(x).argmax(1) == y).float().mean(), add_dataloader_idx=False)
        else:
            self.log("val_confidence", self(batch).softmax(1).amax(1).mean(), add_dataloader_idx=False)


class TwoTasks(L.LightningModule):
    """One body and two heads, with a label each."""

    def __init__(self):
        super().__init__()
        self.body = mlp()[:3]
        self.digit, self.large = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, x):
        features = self.body(x)
        return self.digit(features), self.large(features).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, digit, large = batch
        logits, logit = self(x)
        first, second = F.cross_entropy(logits, digit), F.binary_cross_entropy_with_logits(logit, large)
        self.log_dict({"train_digit_loss": first, "train_large_loss": second})
        return first + second

    def validation_step(self, batch, batch_idx):
        x, digit, large = batch
        logits, logit = self(x)
        self.log("val_digit_acc", (logits.argmax(1) == digit).float().mean())
        self.log("val_large_acc", ((logit > 0) == large.bool()).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 5e-3)


def keyed(x: str, y: str) -> Any:
    return lambda: digit_loaders(collate=dictionaries(x, y))


def meta_loaders(nested: bool = False) -> tuple[Any, Any]:
    images, labels = digits()
    meta = torch.rand(len(images), 3, generator=generator())

    def nest(rows: list) -> Any:
        x, m, y = stack(rows)
        return (x, m), y

    return loaders(images, meta, labels, collate=nest if nested else None)


def two_train_loaders() -> tuple[Any, Any]:
    (first, val), (second, _) = digit_loaders(batch_size=50), digit_loaders(batch_size=50)
    return CombinedLoader({"a": first, "b": second}, "max_size_cycle"), val


def second_unlabelled() -> tuple[Any, Any]:
    train, val = digit_loaders()
    return train, [val, DataLoader(digits()[0][800:900], 100)]


def two_task_loaders() -> tuple[Any, Any]:
    images, labels = digits()
    return loaders(images, labels, (labels >= 5).float())


def two_task_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    features = module.body(x)
    large = F.binary_cross_entropy_with_logits(module.large(features).squeeze(1), batch[2], reduction="none")
    return F.cross_entropy(module.digit(features), batch[1], reduction="none") + large


def two_train_loss(module: Any, batch: Any, x: list[Tensor]) -> Tensor:
    first, second = (F.cross_entropy(module.net(part), batch[key][1]) for part, key in zip(x, "ab", strict=True))
    return first + second


PIPELINES = [
    classifier(
        "dict_batch",
        DictBatch,
        keyed("image", "label"),
        labels=lambda batch: batch["label"],
        clean_inputs=lambda module, batch: batch["image"],
    ),
    classifier("dict_output", DictOutput, digit_loaders, logits=lambda module, batch, x: module.net(x)),
    classifier("tuple_output", TupleOutput, digit_loaders, logits=lambda module, batch, x: module.net(x)),
    classifier(
        "keyword_forward",
        KeywordForward,
        keyed("pixel_values", "labels"),
        labels=lambda batch: batch["labels"],
        clean_inputs=lambda module, batch: batch["pixel_values"],
    ),
    classifier(
        "forward_computes_loss",
        ForwardComputesLoss,
        keyed("pixel_values", "labels"),
        logits=lambda module, batch, x: module.net(x),
        labels=lambda batch: batch["labels"],
        clean_inputs=lambda module, batch: batch["pixel_values"],
    ),
    classifier(
        "forward_of_two",
        ForwardOfTwo,
        meta_loaders,
        logits=lambda module, batch, x: module(x, batch[1]),
        labels=lambda batch: batch[2],
        gain=0.06,
    ),
    classifier(
        "nested_inputs",
        NestedInputs,
        lambda: meta_loaders(nested=True),
        logits=lambda module, batch, x: module(x, batch[0][1]),
        clean_inputs=lambda module, batch: batch[0][0],
        gain=0.06,
    ),
    classifier(
        "two_train_loaders",
        TwoLoaders,
        two_train_loaders,
        train_loss=two_train_loss,
        train_inputs=lambda module, batch: [batch["a"][0], batch["b"][0]],
        monitor_arguments={},
    ),
    classifier("unlabelled_second_loader", UnlabelledSecond, second_unlabelled, gain=0.08),
    Pipeline(
        "two_tasks",
        "multi-task",
        TwoTasks,
        two_task_loaders,
        two_task_loss,
        lambda module, batch, x: accuracy(module.digit(module.body(x)), batch[1]),
        metric="val_digit_acc",
        gain=0.05,
        tolerance=0.1,
    ),
]
