"""The user's own metrics under attack are what a validation on the attacked inputs logs, and the clean ones are left alone."""

from __future__ import annotations

import csv
import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.lightning_modules import DigitsClassifier, digits, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, F1Score, MetricCollection

from lightning_wdefense import DetectionMonitor, RobustnessMonitor, ThreatModel
from lightning_wdefense._compat import loggable_key
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
    module.load_state_dict(_trained_state())
    return module


@functools.cache
def _trained_state():
    torch.manual_seed(0)
    module = Logging()
    images, labels = digits()
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(images[:512]), labels[:512]).backward()
        optimizer.step()
    return module.state_dict()


def loaders(number, attack_with=None):
    images, labels = digits()
    found = []
    for index in range(number):
        x, y = images[600 + 100 * index : 700 + 100 * index], labels[600 + 100 * index : 700 + 100 * index]
        if attack_with is not None:
            x = torch.cat([ATTACK(attack_with, *part) for part in zip(x.split(32), y.split(32), strict=True)])
        found.append(DataLoader(TensorDataset(x, y), 32))
    return found if number > 1 else found[0]


# Every pair of two of the three.
@pytest.mark.parametrize(
    ("stage", "number", "through"),
    [("validate", 1, "model"), ("validate", 2, "step"), ("test", 1, "step"), ("test", 2, "model")],
)
def test_as_in_a_validation_on_the_attacked_inputs(stage, number, through):
    module = made()
    monitor = RobustnessMonitor(THREAT, [ATTACK], through=through)
    logged = quiet_values(module, loaders(number), stage, [monitor])
    clean = quiet_values(made(), loaders(number), stage, [])
    attacked = quiet_values(made(), loaders(number, attack_with=made()), stage, [])
    for key, value in clean.items():
        assert logged[key] == value, key
        assert logged[f"robust/{loggable_key(key)}"] == pytest.approx(attacked[key], abs=1e-5), key
    suffix = "/dataloader_idx_0" if number > 1 else ""
    assert logged[f"robust/accuracy{loggable_key(suffix)}"] < logged[f"accuracy{suffix}"] - 0.2
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


class Hooked(DigitsClassifier):
    """Leans on its hooks at the start, on Lightning's own values, and hides its metrics."""

    def __init__(self):
        super().__init__()
        self.hidden = [Accuracy("multiclass", num_classes=10)]
        self.named = {"all": MetricCollection([Accuracy("multiclass", num_classes=10, average="macro")])}
        self.history: list[float] = []

    def on_validation_epoch_start(self):
        self.rows = []

    def on_validation_batch_start(self, batch, batch_idx, dataloader_idx=0):
        self.current = (batch_idx, dataloader_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert self.current == (batch_idx, dataloader_idx)
        logits = self(batch[0])
        self.hidden[0].update(logits, batch[1])
        self.named["all"].update(logits, batch[1])
        self.rows.append(F.cross_entropy(logits, batch[1], reduction="none"))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean(), on_step=True, on_epoch=True, prog_bar=True)
        self.log("smallest", self.rows[-1].min(), reduce_fx="min", batch_size=len(batch[1]))

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        del self.current

    def on_validation_epoch_end(self):
        self.log("worst", torch.cat(self.rows).max())
        self.log("hidden", self.hidden[0].compute())
        self.log_dict(self.named["all"].compute())
        self.log("read", self.trainer.callback_metrics["accuracy_epoch"] + 1)
        self.history.append(float(torch.cat(self.rows).sum()))
        for metric in (self.hidden[0], self.named["all"]):
            metric.reset()


def hooked():
    module = Hooked()
    module.load_state_dict(made().state_dict())
    return module


@pytest.mark.parametrize("through", ["model", "step"])
def test_hooks_at_the_start_hidden_metrics_and_the_trainers_values(through):
    module, alone = hooked(), hooked()
    logged = quiet_values(module, loaders(1), "validate", [RobustnessMonitor(THREAT, [ATTACK], through=through)])
    clean = quiet_values(alone, loaders(1), "validate", [])
    attacked = quiet_values(hooked(), loaders(1, attack_with=made()), "validate", [])
    assert {"worst", "hidden", "read", "accuracy", "accuracy_epoch", "smallest"} <= clean.keys()
    for key, value in clean.items():
        assert logged[key] == value, key
        assert logged[f"robust/{loggable_key(key)}"] == pytest.approx(attacked[key], abs=1e-5), key
    assert logged["robust/hidden"] < logged["hidden"] - 0.2
    assert module.history == alone.history
    assert vars(module).keys() == vars(alone).keys()


@pytest.mark.parametrize("monitors", [1, 2])
def test_a_training_under_monitors_is_that_without(monitors, tmp_path):
    """Weights, logged values, files, metrics and containers, bit for bit."""

    def run(folder, callbacks):
        torch.manual_seed(1)
        module = hooked()
        images, labels = digits()
        train = DataLoader(TensorDataset(images[:256], labels[:256]), 64, shuffle=True)
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, logger=CSVLogger(folder), log_every_n_steps=1)
        trainer.fit(module, train, loaders(1))
        ours = ("robust/", "val/")
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if not key.startswith(ours)}
        with open(next(folder.rglob("metrics.csv"))) as file:
            rows = [
                {key: value for key, value in row.items() if value and not key.startswith(ours)}
                for row in csv.DictReader(file)
            ]
        weights = [parameter.tolist() for parameter in module.parameters()]
        return weights, values, rows, module.history, module.hidden[0]._update_count, torch.get_rng_state().tolist()

    names = ["one", "two"][:monitors]
    callbacks = [RobustnessMonitor(THREAT, ["pgd"], name=name, every_n_epochs=k + 1) for k, name in enumerate(names)]
    alone, watched = run(tmp_path / "alone", []), run(tmp_path / "watched", callbacks)
    for one, other in zip(alone, watched, strict=True):
        assert one == other


class Gathering(DigitsClassifier):
    """Its hook at the end of the epoch counts on batches."""

    def __init__(self):
        super().__init__()
        self.predicted = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.predicted.append(self(batch[0]).argmax(1))
        self.log("loss", self.loss(batch))

    def on_validation_epoch_end(self):
        self.log("gathered", float(len(torch.cat(self.predicted))))
        self.predicted.clear()


@pytest.mark.parametrize(
    "monitor",
    [DetectionMonitor(THREAT, detectors=["energy"]), RobustnessMonitor(THREAT, dataloaders=[7])],
    ids=["detection", "no such dataloader"],
)
def test_the_hook_at_the_end_is_not_called_for_nothing(monitor):
    values = quiet_values(Gathering(), loaders(1), "validate", [monitor])
    assert values["gathered"] == 100
    assert not any(key.startswith("robust/") for key in values)
