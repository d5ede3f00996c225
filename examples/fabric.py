"""A robust model with Lightning Fabric on two processes: the transport compares the samples of both.

python examples/fabric.py
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from lightning import Fabric
from own_loop import THREAT, loaders, network

from lightning_wdefense import Recipe, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy="ddp" if options.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0)
    module = network()
    model, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters(), lr=3e-3))
    train, test = fabric.setup_dataloaders(*loaders())

    # With gather=True the gradient is that of one process with the whole batch. Bind what Fabric returned, not the module.
    recipe = Recipe.named("class-transport", THREAT, gather=True)
    defense = recipe.bind(model, warmup_steps=3 * len(train))
    for epoch in range(options.epochs):
        model.train()
        for inputs, labels in train:
            optimizer.zero_grad()
            output = defense(inputs, labels)
            fabric.backward(output.loss)
            optimizer.step()
        fabric.print(f"epoch {epoch}: loss {float(output.loss.detach()):.3f}, eps {output.logs['eps']:.3f}")

    result = evaluate(model, test, THREAT, ["pgd"])  # every process attacks its share, and returns the values of all
    fabric.print(result)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
