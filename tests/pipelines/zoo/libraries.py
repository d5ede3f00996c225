"""Modules and models that others have published."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from pipelines.data import digit_loaders, generator, loaders
from pipelines.pipeline import Pipeline, classifier
from pipelines.zoo.classification import Plain
from pipelines.zoo.dense import IGNORED, mask_loaders, mean_iou
from support.lightning_modules import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import box_iou

from lightning_wdefense import ThreatModel

VOCABULARY, LENGTH = 12, 8


class TorchvisionClassifier(Plain):
    def __init__(self):
        super().__init__()
        self.net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)

    def forward(self, x):
        return self.net(x.expand(-1, 3, -1, -1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


class TimmClassifier(Plain):
    def __init__(self):
        import timm

        super().__init__()
        self.net = timm.create_model("resnet10t", in_chans=1, num_classes=10)


class TorchvisionSegmenter(L.LightningModule):
    """``{"out": ..., "aux": ...}``."""

    def __init__(self):
        super().__init__()
        body = nn.Sequential(
            OrderedDict(
                low=nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
                high=nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            )
        )
        backbone = IntermediateLayerGetter(body, {"low": "aux", "high": "out"})
        self.model = FCN(backbone, FCNHead(32, 2), FCNHead(16, 2))

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        image, mask = batch
        outputs = self(image)
        out, aux = (F.cross_entropy(outputs[key], mask, ignore_index=IGNORED) for key in ("out", "aux"))
        return out + 0.4 * aux

    def validation_step(self, batch, batch_idx):
        image, mask = batch
        self.log("val_miou", mean_iou(self(image)["out"], mask))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


class TorchvisionDetector(L.LightningModule):
    """Losses while it trains, detections otherwise; lists of images and of dictionaries."""

    def __init__(self):
        super().__init__()
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        backbone.out_channels = 32
        anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
        self.model = FCOS(backbone, 2, anchor_generator=anchors, min_size=32, max_size=32, score_thresh=0.0)

    def forward(self, images, targets=None):
        return self.model(images, targets)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        losses = self(images, targets)
        self.log_dict({f"train_{key}": value for key, value in losses.items()}, batch_size=len(images))
        return sum(losses.values())

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        self.log("val_iou", best_iou(self(images), targets), batch_size=len(images))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


def best_iou(detections: list, targets: list) -> Tensor:
    """Of the most certain detection with the one object."""
    ious = [
        box_iou(found["boxes"][found["scores"].argmax()][None], target["boxes"]).max()
        if len(found["boxes"])
        else torch.tensor(0.0)
        for found, target in zip(detections, targets, strict=True)
    ]
    return torch.stack(ious).mean()


def boxes_loaders() -> tuple[Any, Any]:
    """A square a little brighter than a noisy ground."""
    draw = generator()
    rows = []
    for _ in range(160):
        image = 0.3 + 0.1 * torch.randn(3, 32, 32, generator=draw)
        side = int(torch.randint(8, 14, (), generator=draw))
        left, top = torch.randint(0, 32 - side, (2,), generator=draw).tolist()
        image[:, top : top + side, left : left + side] += 0.4
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        rows.append((image.clamp(0, 1), {"boxes": box, "labels": torch.tensor([1])}))

    def collate(rows: list) -> Any:
        images, targets = zip(*rows, strict=True)
        return [image.clone() for image in images], list(targets)

    return (
        DataLoader(rows[:120], 30, shuffle=True, collate_fn=collate),
        DataLoader(rows[120:], 40, collate_fn=collate),
    )


def few_digits() -> tuple[Any, Any]:
    (images, labels), batch = digits(), 50
    train, val = (TensorDataset(images[i:j], labels[i:j]) for i, j in ((0, 400), (600, 700)))
    return DataLoader(train, batch, shuffle=True), DataLoader(val, batch)


def boring_loaders() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return DataLoader(RandomDataset(32, 64), 8), DataLoader(RandomDataset(32, 64), 64)


class DemoLSTM(LightningLSTM):
    """As Lightning ships it, but small, on other text; it carries its hidden state from step to step."""

    def __init__(self):
        super().__init__(vocab_size=VOCABULARY)
        self.model = SimpleLSTM(VOCABULARY, ninp=24, nhid=32, nlayers=1, dropout=0.0)

    def prepare_data(self):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def text_loaders() -> tuple[Any, Any]:
    """Counting up with steps of one or, at times, two."""
    draw = generator()
    steps = 1 + (torch.rand(800, LENGTH + 1, generator=draw) < 0.1).long()
    text = (torch.randint(0, VOCABULARY, (800, 1), generator=draw) + steps.cumsum(1)) % VOCABULARY
    return loaders(text[:, :-1], text[:, 1:])


def lstm_nll(module: Any, batch: Any, x: Tensor) -> Tensor:
    hidden = module.model.init_hidden(len(x))
    log_p = module.model.decoder(module.model.rnn(x, hidden)[0]).log_softmax(-1)
    return F.nll_loss(log_p.transpose(1, 2), batch[1], reduction="none").mean(1)


def detection_loss(module: Any, batch: Any, x: list[Tensor]) -> Tensor:
    module.model.train()
    losses = sum(module.model(x, batch[1]).values())
    module.model.eval()
    return losses


def segmentation_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    logits = module.model(x)["out"]
    return F.cross_entropy(logits, batch[1], ignore_index=IGNORED, reduction="none").flatten(1).sum(1)


def boring_loss(module: Any, batch: Any, x: Tensor) -> Tensor:
    return (module.layer(x) - 1).square().mean(1)


PIPELINES = [
    classifier("torchvision_resnet", TorchvisionClassifier, few_digits, epochs=8),
    classifier("timm_resnet", TimmClassifier, digit_loaders, epochs=4, needs="timm"),
    Pipeline(
        "torchvision_segmentation",
        "segmentation",
        TorchvisionSegmenter,
        mask_loaders,
        segmentation_loss,
        lambda module, batch, x: mean_iou(module.model(x)["out"], batch[1]).item(),
        metric="val_miou",
        threat=ThreatModel(eps=0.15),
        epochs=12,
        gain=0.02,
    ),
    Pipeline(
        "torchvision_detection",
        "detection",
        TorchvisionDetector,
        boxes_loaders,
        detection_loss,
        lambda module, batch, x: best_iou(module.model(x), batch[1]).item(),
        metric="val_iou",
        tolerance=0.1,  # the trained weights, and with them the attacks' luck, differ by the kind of processor
        epochs=8,
        gain=0.24,
    ),
    Pipeline(
        "lightning_boring",
        "regression",
        BoringModel,
        boring_loaders,
        boring_loss,
        lambda module, batch, x: boring_loss(module, batch, x).mean().item(),
        clean_inputs=lambda module, batch: batch,
        threat=ThreatModel(eps=0.3, bounds=None),
        metric=None,
        better="lower",
        epochs=2,
        gain=0.17,
    ),
    Pipeline(
        "lightning_lstm",
        "text",
        DemoLSTM,
        text_loaders,
        lstm_nll,
        lambda module, batch, x: lstm_nll(module, batch, x).mean().item(),
        clean_inputs=lambda module, batch: module.model.encoder(batch[0]),
        threat=ThreatModel(eps=0.05, bounds=None),
        arguments={"perturb": "model.encoder"},
        metric=None,
        better="lower",
    ),
]
