"""The user's own metrics under attack are what a validation on the attacked inputs logs, and the clean ones are left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from support.lightning_modules import DigitsClassifier, digits, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, F1Score, MetricCollection

from lightning_wdefense import RobustnessMonitor, ThreatModel
from lightning_wdefense.attacks import PGD

pytestmark = pytest.mark.filterwarnings("ignore")
THREAT = ThreatModel(eps=0.1)
ATTACK = PGD(THREAT, steps=3, random_start=False)


class Logging(DigitsClassifier):
    """Logs in every way there is."""

    def __init__(self):
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=10)
        self.both = MetricCollection(
            {
                "acc": Accuracy("multiclass", num_classes=10),
                "f1": F1Score("multiclass", num_classes=10, average="macro"),
            }
        )
        self.at_the_end = Accuracy("multiclass", num_classes=10)
        self.right, self.count, self.ends = [], 0, 0

    def _step(self, batch):
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.both.update(logits, y)
        self.at_the_end.update(logits, y)
        self.right.append((logits.argmax(1) == y).float())
        self.count += len(y)
        self.log("loss", F.cross_entropy(logits, y))
        self.log("loss_max", F.cross_entropy(logits, y), reduce_fx="max")
        self.log("steps", F.cross_entropy(logits, y), on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy)
        self.log_dict(self.both)
        return logits

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"logits": self._step(batch)}

    test_step = validation_step

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.ends += len(outputs["logits"])

    def on_validation_epoch_end(self):
        self.log("at_the_end", self.at_the_end.compute())
        self.log("by_list", torch.cat(self.right).mean())
        self.log("counted", float(self.count + self.ends))
        self.at_the_end.reset()
        self.right.clear()
        self.count = self.ends = 0

    on_test_epoch_end = on_validation_epoch_end
    on_test_batch_end = on_validation_batch_end


def made():
    torch.manual_seed(0)
    module = Logging()
    images, labels = digits()
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(images[:512]), labels[:512]).backward()
        optimizer.step()
    return module


def loaders(number, attack_with=None):
    images, labels = digits()
    found = []
    for index in range(number):
        x, y = images[600 + 100 * index : 700 + 100 * index], labels[600 + 100 * index : 700 + 100 * index]
        if attack_with is not None:
            x = torch.cat([ATTACK(attack_with, *part) for part in zip(x.split(32), y.split(32), strict=True)])
        found.append(DataLoader(TensorDataset(x, y), 32))
    return found if number > 1 else found[0]


@pytest.mark.parametrize("through", ["model", "step"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_as_in_a_validation_on_the_attacked_inputs(stage, number, through):
    module = made()
    monitor = RobustnessMonitor(THREAT, [ATTACK], through=through)
    logged = quiet_values(module, loaders(number), stage, [monitor])
    clean = quiet_values(made(), loaders(number), stage, [])
    attacked = quiet_values(made(), loaders(number, attack_with=made()), stage, [])
    for key, value in clean.items():
        assert logged[key] == value, key
        assert logged[f"robust/{key}"] == pytest.approx(attacked[key], abs=1e-5), key
    suffix = "/dataloader_idx_0" if number > 1 else ""
    assert logged[f"robust/accuracy{suffix}"] < logged[f"accuracy{suffix}"] - 0.2
    assert logged["robust/by_list"] == pytest.approx(logged["robust/at_the_end"])
    assert logged["robust/counted"] == logged["counted"] == 200 * number
    assert (module.count, module.ends, module.right, module.at_the_end._update_count) == (0, 0, [], 0)


def quiet_values(module, loader, stage, callbacks):
    trainer = quiet_trainer(callbacks=callbacks)
    getattr(trainer, stage)(module, loader, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_two_monitors_and_their_names():
    weak = RobustnessMonitor(ThreatModel(eps=0.02), ["fgsm"], name="weak")
    logged = quiet_values(made(), loaders(1), "validate", [weak, RobustnessMonitor(THREAT, [ATTACK])])
    assert logged["robust/accuracy"] < logged["robust/weak/accuracy"] < logged["accuracy"]
    assert quiet_values(made(), loaders(1), "validate", [])["accuracy"] == logged["accuracy"]


def test_the_best_model_is_chosen_by_it_and_epochs_in_between_keep_the_value(tmp_path):
    class Spy(ModelCheckpoint):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics["robust/accuracy"]))
            super().on_validation_end(trainer, pl_module)

    seen: list[float] = []
    images, labels = digits()
    keep = Spy(tmp_path, monitor="robust/accuracy", mode="max", save_top_k=1)
    trainer = quiet_trainer(
        max_epochs=4,
        enable_checkpointing=True,
        callbacks=[RobustnessMonitor(THREAT, [ATTACK], every_n_epochs=2), keep],
    )
    trainer.fit(made(), DataLoader(TensorDataset(images[:256], labels[:256]), 64), loaders(1))
    assert keep.best_model_score is not None
    values = seen[-4:]
    assert values[0] == values[1]
    assert values[2] == values[3]
    assert float(keep.best_model_score) == pytest.approx(max(values))


@pytest.mark.parametrize("sanity", [0, 2, -1])
def test_max_batches_and_the_sanity_check(sanity):
    images, labels = digits()
    monitor = RobustnessMonitor(THREAT, [ATTACK], max_batches=1)
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=sanity, callbacks=[monitor])
    trainer.fit(made(), DataLoader(TensorDataset(images[:64], labels[:64]), 64), loaders(1))
    assert trainer.callback_metrics["robust/counted"] == 2 * 32
    assert trainer.callback_metrics["counted"] == 2 * 100
