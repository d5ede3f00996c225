"""Trains recipes in loops of one's own with a wrapped model on two ranks, and under Lightning's DDP; run by test_wrappers.py."""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from lightning import Fabric, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from support.lightning_modules import DigitsClassifier, digits, quiet_trainer
from support.processes import group_ends
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense
from lightning_wdefense._ranks import Ranks

THREAT = ThreatModel(eps=0.2)
STEPS, SIZE = 4, 16


def batches(rank):
    """The batches of one rank."""
    own = torch.arange(STEPS * SIZE) * 2 + rank
    return DataLoader(TensorDataset(*(each[own] for each in digits())), batch_size=SIZE)


def module_of():
    torch.manual_seed(0)
    return DigitsClassifier(batch_norm=True)  # whose buffers DDP sends in each of its forward passes


def recipe_of(case):
    name, *changes = case.split("+")
    return Recipe.named(name, THREAT, gather="gather" in changes, awp=0.01 * ("awp" in changes), warmup_epochs=0)


def by_ddp(recipe, ranks):
    module = module_of()
    wrapped = DistributedDataParallel(module)
    defense = recipe.bind(wrapped)
    optimizer = module.configure_optimizers()
    for batch in batches(ranks.rank):
        optimizer.zero_grad()
        defense(*batch, measure=True).loss.backward()
        optimizer.step()
    assert "forward" not in vars(wrapped)
    return module


def by_fabric(recipe, ranks, precision="32-true"):
    module = module_of()
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision=precision)
    fabric.launch()
    model, optimizer = fabric.setup(module, module.configure_optimizers())
    defense = recipe.bind(model)
    for batch in batches(fabric.global_rank):
        optimizer.zero_grad()
        fabric.backward(defense(*batch).loss)
        optimizer.step()
    return module


def by_fully_shard(recipe, ranks, shard=True):
    """FSDP2, or DDP beside it: without BatchNorm, whose buffers FSDP2 leaves to each rank."""
    from torch.distributed.fsdp import fully_shard  # torch 2.6 and later

    torch.manual_seed(0)
    module = DigitsClassifier()
    if shard:
        for layer in (*(each for each in module.net if list(each.parameters())), module):
            fully_shard(layer)
    defense = recipe.bind(module if shard else DistributedDataParallel(module))
    optimizer = torch.optim.SGD(module.parameters(), 0.2)
    for batch in batches(ranks.rank):
        optimizer.zero_grad()
        defense(*batch, measure=True).loss.backward()
        optimizer.step()
    return {key: each.full_tensor() if shard else each for key, each in module.state_dict().items()}


def by_lightning(recipe, ranks):
    module = module_of()
    trainer = quiet_trainer(
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=[WassersteinDefense(recipe)],
        log_every_n_steps=1,
        use_distributed_sampler=False,  # which would shuffle
    )
    trainer.fit(module, batches(ranks.rank))
    return module


class Uneven(LightningModule):
    """Gets one batch more on rank 0."""

    def __init__(self):
        super().__init__()
        self.inner = DigitsClassifier()
        self.began = 0

    def forward(self, x):
        return self.inner(x)

    def train_dataloader(self):
        images, labels = digits()
        samples = (3 - self.global_rank) * SIZE
        return DataLoader(TensorDataset(images[:samples], labels[:samples]), batch_size=SIZE)

    def training_step(self, batch, batch_idx):
        self.began += 1
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def unequal_batches():
    """The error where ranks have different numbers of batches, and how many began."""
    module = Uneven()
    trainer = Trainer(
        strategy=DDPStrategy(),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        callbacks=[WassersteinDefense("pgd-at", threat=THREAT)],
    )
    try:
        trainer.fit(module)
    except Exception as error:
        return f"{type(error).__name__} after {module.began} batches: {error}"
    return "no error"


def main(folder, *cases):
    dist.init_process_group("gloo")
    ranks = Ranks.current()
    results = {}
    for case in cases:
        recipe = recipe_of(case)
        results[case] = {
            kind.__name__: {key: value.clone() for key, value in kind(recipe, ranks).state_dict().items()}
            for kind in (by_ddp, by_fabric, by_lightning)
        }
    lossy = by_fabric(recipe_of("class-transport"), ranks, "bf16-mixed").state_dict()
    results["bf16"] = {key: value.clone() for key, value in lossy.items()}
    if hasattr(torch.distributed.fsdp, "fully_shard"):
        recipe = recipe_of("class-transport+gather")
        results["sharded"], results["whole"] = (by_fully_shard(recipe, ranks, shard) for shard in (True, False))
    results["unequal"] = unequal_batches()
    torch.save(results, f"{folder}/{ranks.rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with group_ends():
        main(*sys.argv[1:])
