"""Classifiers of digits, each with a step of its own."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import digit_loaders, loaders
from pipelines.pipeline import Pipeline, classifier
from support.lightning_modules import digits
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_wdefense import ThreatModel


def mlp(outputs: int = 10, inputs: int = 64, width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


class Plain(L.LightningModule):
    """As in the first page of a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


class SharedStep(Plain):
    def _step(self, batch, stage):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": (logits.argmax(-1) == y).float().mean()})
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self._step(batch, "val")


class NoBatchIndex(Plain):
    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class SelfDotForward(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.forward(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.forward(x).argmax(1) == y).float().mean())


class BackboneThenHead(Plain):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:3], self.net[3]
        del self.net

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.backbone(x)
        return F.cross_entropy(self.head(features), y) + 1e-4 * features.square().mean()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.head(self.backbone(x)).argmax(1) == y).float().mean())


class NormalisedInStep(Plain):
    def prepare(self, x):
        return (x - 0.3) / 0.1

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(self.prepare(x)), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(self.prepare(x)).argmax(1) == y).float().mean())


class ViewedInStep(Plain):
    def __init__(self):
        super().__init__()
        self.net = self.net[1:]

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.view(x.size(0), -1)
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        x = x.view(x.size(0), -1)
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())


class SigmoidForward(Plain):
    def __init__(self):
        super().__init__()
        self.net = mlp(1)
        self.loss = nn.BCELoss()

    def forward(self, x):
        return torch.sigmoid(self.net(x)).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        p = self(x)
        self.log("val_loss", self.loss(p, y))
        self.log("val_acc", ((p > 0.5).float() == y).float().mean())


class LogSoftmax(Plain):
    def forward(self, x):
        return F.log_softmax(self.net(x), dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.nll_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean())


class MultiLabel(Plain):
    def __init__(self):
        super().__init__()
        self.net = mlp(4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.binary_cross_entropy_with_logits(logits, y))
        self.log("val_acc", ((logits > 0) == y.bool()).float().mean())


class WithCriterion(Plain):
    """The loss is a module of its own, with weights of the classes and label smoothing."""

    def __init__(self, **options: Any):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(**options)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.criterion(self(x), y)


class Focal(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        log_p = F.log_softmax(self(x), 1).gather(1, y[:, None]).squeeze(1)
        return (-((1 - log_p.exp()) ** 2) * log_p).mean()


class LossInDict(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "preds": logits.argmax(1).detach(), "targets": y}


class AppendsOutputs(Plain):
    def __init__(self):
        super().__init__()
        self.outputs: list = []

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.outputs.append({"preds": self(x).argmax(1), "labels": y})

    def on_validation_epoch_end(self):
        preds = torch.cat([output["preds"] for output in self.outputs])
        labels = torch.cat([output["labels"] for output in self.outputs])
        self.log("val_acc", (preds == labels).float().mean())
        self.outputs.clear()


class LogsMetricObjects(Plain):
    def __init__(self):
        super().__init__()
        metrics = MetricCollection(
            {"acc": MulticlassAccuracy(10, average="micro"), "f1": MulticlassF1Score(10, average="macro")}
        )
        self.train_metrics, self.val_metrics = metrics.clone(prefix="train_"), metrics.clone(prefix="val_")

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.train_metrics(logits, y)
        self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_metrics(self(x), y)
        self.log_dict(self.val_metrics)


class ComputesMetrics(Plain):
    """Updates in the step; computes, logs and resets at the end of the epoch."""

    def __init__(self):
        super().__init__()
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_acc.update(self(x), y)

    def on_validation_epoch_end(self):
        self.log("val_acc", self.val_acc.compute())
        self.val_acc.reset()


class DropoutBatchNorm(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(256, 10),
        )


class MixupInStep(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        weight = torch.distributions.Beta(0.4, 0.4).sample()
        order = torch.randperm(len(x))
        logits = self(weight * x + (1 - weight) * x[order])
        return weight * F.cross_entropy(logits, y) + (1 - weight) * F.cross_entropy(logits, y[order])


class AugmentsInStep(Plain):
    def training_step(self, batch, batch_idx):
        x, y = batch
        shift = int(torch.randint(-1, 2, ()))
        x = torch.roll(x, shift, dims=-1) + 0.02 * torch.randn_like(x)
        return F.cross_entropy(self(x), y)


class RDrop(Plain):
    """The model runs twice with other dropout masks."""

    def __init__(self):
        super().__init__()
        self.net.insert(3, nn.Dropout(0.2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        first, second = F.log_softmax(self(x), 1), F.log_softmax(self(x), 1)
        apart = F.kl_div(first, second, log_target=True, reduction="batchmean")
        return F.nll_loss(first, y) + F.nll_loss(second, y) + apart


class AuxiliaryHead(Plain):
    """Returns two outputs while it trains and one otherwise, as GoogLeNet does."""

    def __init__(self):
        super().__init__()
        self.stem, self.aux, self.top = mlp()[:3], nn.Linear(64, 10), nn.Linear(64, 10)
        del self.net

    def forward(self, x):
        features = self.stem(x)
        return (self.top(features), self.aux(features)) if self.training else self.top(features)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, auxiliary = self(x)
        return F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(auxiliary, y)


class FrozenBackbone(Plain):
    """Fine-tunes a head on a backbone whose parameters need no gradient."""

    def __init__(self):
        super().__init__()
        self.backbone = mlp(width=128)[:3].requires_grad_(False)
        self.net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), 5e-3)


class FullyConvolutional(Plain):
    """No linear layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 32, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 10, 2),
            nn.Flatten(),
        )


class SqueezesBatch(Plain):
    """Works with the batch size of its loader alone."""

    def forward(self, x):
        return self.net(x.reshape(100, 64))


MEAN, STD = 0.3, 0.4


def normalised_loaders() -> tuple[Any, Any]:
    images, labels = digits()
    return loaders((images - MEAN) / STD, labels)


def binary_loaders() -> tuple[Any, Any]:
    images, labels = digits()
    return loaders(images, (labels >= 5).float())


def multilabel_loaders() -> tuple[Any, Any]:
    images, labels = digits()
    return loaders(images, torch.stack([(labels >> bit) & 1 for bit in range(4)], 1).float())


def sigmoid_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(module.net(x).squeeze(1), batch[1], reduction="none")


def sigmoid_score(module: Any, batch: Any, x: Tensor) -> float:
    return ((module.net(x).squeeze(1) > 0).float() == batch[1]).float().mean().item()


def multilabel_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(module.net(x), batch[1], reduction="none").sum(1)


def multilabel_score(module: Any, batch: Any, x: Tensor) -> float:
    return ((module.net(x) > 0) == batch[1].bool()).float().mean().item()


PIPELINES = [
    classifier("plain", Plain, digit_loaders),
    classifier("shared_step", SharedStep, digit_loaders),
    classifier("no_batch_index", NoBatchIndex, digit_loaders),
    classifier("self_dot_forward", SelfDotForward, digit_loaders),
    classifier("backbone_then_head", BackboneThenHead, digit_loaders),
    classifier(
        "normalised_in_step", NormalisedInStep, digit_loaders, logits=lambda module, batch, x: module((x - 0.3) / 0.1)
    ),
    classifier(
        "viewed_in_step", ViewedInStep, digit_loaders, logits=lambda module, batch, x: module.net(x.reshape(len(x), 64))
    ),
    classifier(
        "normalised_data", Plain, normalised_loaders, threat=ThreatModel(eps=0.1, mean=MEAN, std=STD), gain=0.09
    ),
    Pipeline("sigmoid_bce", "classification", SigmoidForward, binary_loaders, sigmoid_loss, sigmoid_score, gain=0.21),
    classifier("log_softmax_nll", LogSoftmax, digit_loaders),
    Pipeline(
        "multi_label", "multi-label", MultiLabel, multilabel_loaders, multilabel_loss, multilabel_score, gain=0.05
    ),
    classifier("class_weights", lambda: WithCriterion(weight=torch.linspace(0.5, 1.5, 10)), digit_loaders, gain=0.08),
    classifier("label_smoothing", lambda: WithCriterion(label_smoothing=0.1), digit_loaders, gain=0.08),
    classifier("focal_loss", Focal, digit_loaders),
    classifier("loss_in_dict", LossInDict, digit_loaders),
    classifier("appends_outputs", AppendsOutputs, digit_loaders),
    classifier("metric_collection", LogsMetricObjects, digit_loaders),
    classifier("metric_compute", ComputesMetrics, digit_loaders),
    classifier("dropout_batchnorm", DropoutBatchNorm, digit_loaders),
    classifier("mixup_in_step", MixupInStep, digit_loaders, gain=0.07),
    classifier("augments_in_step", AugmentsInStep, digit_loaders, gain=0.07),
    classifier("r_drop", RDrop, digit_loaders, gain=0.06),
    classifier(
        "auxiliary_head",
        AuxiliaryHead,
        digit_loaders,
        logits=lambda module, batch, x: module.top(module.stem(x)),
        gain=0.08,
    ),
    classifier("frozen_backbone", FrozenBackbone, digit_loaders),
    classifier("fully_convolutional", FullyConvolutional, digit_loaders),
    classifier("fixed_batch_size", SqueezesBatch, digit_loaders),
    classifier("no_step_logging", Plain, digit_loaders, trainer={"log_every_n_steps": 0}),
    classifier("barebones", Plain, digit_loaders, metric=None, trainer={"barebones": True}),
]
