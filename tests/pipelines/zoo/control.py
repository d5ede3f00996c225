"""Reinforcement learning and a GAN."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from pipelines.data import dictionaries, digit_loaders, generator, loaders
from pipelines.pipeline import Pipeline
from pipelines.zoo.classification import mlp
from torch import Tensor, nn

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefenseMixin

STATES = ThreatModel(eps=0.2, bounds=None)


class DQN(L.LightningModule):
    """Learns from replayed transitions, against a target network that it copies now and then."""

    def __init__(self):
        super().__init__()
        self.q, self.target = (
            nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)),
            nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)),
        )
        self.target.requires_grad_(False).load_state_dict(self.q.state_dict())

    def forward(self, states):
        return self.q(states)

    def td_loss(self, batch):
        value = self(batch["states"]).gather(1, batch["actions"][:, None]).squeeze(1)
        with torch.no_grad():
            following = self.target(batch["next_states"]).amax(1)
        return F.mse_loss(value, batch["rewards"] + 0.5 * following)

    def training_step(self, batch, batch_idx):
        if self.global_step % 10 == 0:
            self.target.load_state_dict(self.q.state_dict())
        loss = self.td_loss(batch)
        self.log("td", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_td", self.td_loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.q.parameters(), 5e-3)


class GAN(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.discriminator = mlp(2)

    def made(self, n):
        return self.generator(torch.randn(n, 4)).view(n, 1, 8, 8)

    def pair(self, x, fake):
        return torch.cat([x, fake]), torch.cat([torch.ones(len(x)), torch.zeros(len(fake))]).long()

    def discriminate(self, inputs, labels):
        return F.cross_entropy(self.discriminator(inputs), labels)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        for_generator, for_discriminator = self.optimizers()
        fake = self.made(len(x))
        for_generator.zero_grad()
        self.manual_backward(F.cross_entropy(self.discriminator(fake), torch.ones(len(x)).long()))
        for_generator.step()
        for_discriminator.zero_grad()
        self.manual_backward(self.discriminate(*self.pair(x, fake.detach())))
        for_discriminator.step()

    def validation_step(self, batch, batch_idx):
        x, _ = batch
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(batch_idx))
        inputs, labels = self.pair(x, noise)
        self.log("val_acc", (self.discriminator(inputs).argmax(1) == labels).float().mean(), batch_size=len(x))

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), 1e-3),
            torch.optim.Adam(self.discriminator.parameters(), 2e-3),
        ]


class DefendedGAN(WassersteinDefenseMixin, GAN):
    """Its discriminator is trained robustly."""

    def forward(self, x):
        return self.discriminator(x)

    def configure_defense(self):
        return Recipe.named("pgd-at", ThreatModel(eps=0.1), warmup_epochs=1)

    def discriminate(self, inputs, labels):
        return self.defend(inputs, labels).loss


def replay_loaders() -> tuple[Any, Any]:
    draw = generator()
    states, actions = torch.randn(800, 8, generator=draw), torch.randint(0, 4, (800,), generator=draw)
    rewards = states.gather(1, actions[:, None]).squeeze(1) + 0.5 * states[:, 4:].sum(1)
    following = 0.5 * states + torch.randn(800, 8, generator=draw)
    names = ("states", "actions", "rewards", "next_states")
    return loaders(states, actions, rewards, following, collate=dictionaries(*names))


def td_error(module: Any, batch: Any, x: Tensor) -> Tensor:
    value = module.q(x)[torch.arange(len(x)), batch["actions"]]
    return (value - batch["rewards"] - 0.5 * module.target(batch["next_states"]).amax(1).detach()).square()


def real_or_noise(module: Any, batch: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(module.discriminator(x), torch.ones(len(x)).long(), reduction="none")


PIPELINES = [
    Pipeline(
        "dqn",
        "reinforcement learning",
        DQN,
        replay_loaders,
        td_error,
        lambda module, batch, x: td_error(module, batch, x).mean().item(),
        clean_inputs=lambda module, batch: batch["states"],
        threat=STATES,
        arguments={"inputs": "states"},
        metric="val_td",
        better="lower",
        tolerance=0.15,
        gain=0.21,
    ),
    Pipeline(
        "gan_by_mixin",
        "GAN",
        GAN,
        digit_loaders,
        real_or_noise,
        lambda module, batch, x: (module.discriminator(x).argmax(1) == 1).float().mean().item(),
        metric=None,
        defended=DefendedGAN,
        gain=0.37,
    ),
    Pipeline("gan_by_callback", "GAN", GAN, digit_loaders, refused="WassersteinDefenseMixin"),
]
