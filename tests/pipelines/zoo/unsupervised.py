"""Nothing is predicted but the inputs."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import TRAIN, VAL, digit_loaders
from pipelines.pipeline import Pipeline
from support.lightning_modules import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_wdefense import ThreatModel


def coder(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


class AutoEncoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = coder(64, 8), coder(8, 64)

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        self.log("val_loss", F.mse_loss(self.decoder(self.encoder(x)), x))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


class DenoisingAutoEncoder(AutoEncoder):
    """Draws its noise in the step; batches are one tensor."""

    def training_step(self, batch, batch_idx):
        x = batch.flatten(1)
        return F.mse_loss(self.decoder(self.encoder(x + 0.1 * torch.randn_like(x))), x)

    def validation_step(self, batch, batch_idx):
        x = batch.flatten(1)
        self.log("val_loss", F.mse_loss(self.decoder(self.encoder(x)), x))


class VAE(AutoEncoder):
    def __init__(self):
        super().__init__()
        self.encoder = coder(64, 16)

    def elbo(self, x):
        mean, log_var = self.encoder(x).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (0.5 * log_var).exp() if self.training else mean
        reconstruction = F.mse_loss(self.decoder(code), x, reduction="none").sum(1)
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1)
        return (reconstruction + 0.1 * kl).mean()

    def training_step(self, batch, batch_idx):
        loss = self.elbo(batch[0].flatten(1))
        self.log("train_elbo", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_elbo", self.elbo(batch[0].flatten(1)))


def image_loaders() -> tuple[Any, Any]:
    images, _ = digits()
    return DataLoader(images[:TRAIN], 100, shuffle=True), DataLoader(images[TRAIN : TRAIN + VAL], 100)


def reconstruction(module: Any, batch: Any, x: Tensor) -> Tensor:
    x = x.flatten(1)
    return (module.decoder(module.encoder(x)) - x).square().mean(1)


def elbo(module: Any, batch: Any, x: Tensor) -> Tensor:
    x = x.flatten(1)
    mean, log_var = module.encoder(x).chunk(2, 1)
    kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1)
    return (module.decoder(mean) - x).square().sum(1) + 0.1 * kl


def unsupervised(name: str, make: Any, loaders: Any, loss: Any = reconstruction, **options: Any) -> Pipeline:
    return Pipeline(
        name,
        "self-supervised",
        make,
        loaders,
        loss,
        lambda module, batch, x: loss(module, batch, x).mean().item(),
        better="lower",
        tolerance=0.15,
        **({"metric": "val_loss", "threat": ThreatModel(eps=0.2), "epochs": 20} | options),
    )


PIPELINES = [
    unsupervised("autoencoder", AutoEncoder, digit_loaders),
    unsupervised(
        "denoising_autoencoder",
        DenoisingAutoEncoder,
        image_loaders,
        clean_inputs=lambda module, batch: batch,
        gain=0.07,
    ),
    unsupervised("vae", VAE, digit_loaders, elbo, metric="val_elbo", gain=0.08),
]
