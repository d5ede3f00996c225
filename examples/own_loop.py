"""A robust model in a training loop of your own, without Lightning's Trainer: plain PyTorch, a checkpoint, and the measurement.

python examples/own_loop.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import Recipe, ThreatModel, evaluate

THREAT = ThreatModel(norm="linf", eps=0.2)


def loaders() -> tuple[DataLoader, DataLoader]:
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    train = TensorDataset(images[:1300], labels[:1300])
    test = TensorDataset(images[1300:], labels[1300:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=256)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = loaders()
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    # eps grows over the first three epochs; the noise depends on the seed, the number of the batch and the rank.
    defense = Recipe.named("class-transport", THREAT).bind(model, seed=0, warmup_steps=3 * len(train))
    step = 0
    for epoch in range(options.epochs):
        model.train()
        for inputs, labels in train:
            optimizer.zero_grad()
            output = defense(inputs, labels, step=step)
            output.loss.backward()
            optimizer.step()
            step += 1
        parts = ", ".join(f"{name} {float(value):.3f}" for name, value in output.logs.items())
        print(f"epoch {epoch}: {parts}")

    # What the recipe has learned belongs into the checkpoint: {"model": ..., "defense": defense.state_dict()}.
    print("defended batches:", defense.state_dict()["batches"])
    defense.detach()  # no hook stays in the model
    print(evaluate(model, test, THREAT, ["pgd"]))


if __name__ == "__main__":
    main()
