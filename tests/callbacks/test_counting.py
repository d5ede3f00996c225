"""The warm-up counts defended batches, and what is measured follows Lightning's own logging steps."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from support.learned import plain
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer

from lightning_wdefense import Recipe, ThreatModel, WassersteinDefense, WassersteinDefenseMixin
from lightning_wdefense.attacks import FGSM, LagrangianAttack
from lightning_wdefense.defenses.defense import UNTRAINED

THREAT = ThreatModel(eps=0.2)
OPTIONS = {"limit_train_batches": 4, "log_every_n_steps": 2, "max_epochs": 2}
WARMUP = [0.2 * min(1, (batch + 1) / 6) for batch in range(8)]  # of 1.5 epochs


def recipe(attack=FGSM):
    return Recipe(attack(THREAT), warmup_epochs=1.5)


def loader():
    return digits_loaders(batch_size=8, shuffle=False)[0]


class Logged(DigitsClassifier):
    """Keeps what is logged of the defense in each batch."""

    def __init__(self):
        super().__init__()
        self.eps, self.measured = [], []

    def log_dict(self, values, **options):
        self.eps.append(float(values["defense/eps"]))
        self.measured.append("defense/clean_acc" in values)
        super().log_dict(values, **options)


class Closures(Logged):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


class Skips(Logged):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx % 2 else None


class Manual(WassersteinDefenseMixin, DigitsClassifier):
    def __init__(self, optimizers, every):
        super().__init__()
        self.automatic_optimization = False
        self.number, self.every, self.eps, self.measured = optimizers, every, [], []

    def configure_defense(self):
        return recipe()

    def training_step(self, batch, batch_idx):
        output = self.defend(*batch)
        self.eps.append(output.logs["eps"])
        self.measured.append("clean_acc" in output.logs)
        self.manual_backward(output.loss)
        optimizers = self.optimizers()
        for optimizer in optimizers if self.number > 1 else [optimizers]:
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.01) for _ in range(self.number)]


@pytest.mark.parametrize(("optimizers", "every"), [(1, 1), (2, 1), (1, 4)])
def test_manual_optimisation(optimizers, every):
    quiet_trainer(**OPTIONS).fit(module := Manual(optimizers, every), loader())
    assert module.eps == pytest.approx(WARMUP)
    assert module.measured == [False, True] * 4


def test_accumulation_measures_once_a_logging_step():
    options = OPTIONS | {"accumulate_grad_batches": 2, "callbacks": [WassersteinDefense(recipe())]}
    quiet_trainer(**options).fit(module := Logged(), loader())
    assert module.eps == pytest.approx(WARMUP)
    assert module.measured == [False, False, False, True] * 2


def test_an_optimizer_that_calls_the_step_again():
    quiet_trainer(**OPTIONS, callbacks=[WassersteinDefense(recipe())]).fit(module := Closures(), loader())
    assert sorted(set(module.eps)) == pytest.approx(WARMUP[:6])
    assert len(module.eps) > 8


def test_a_skipped_batch_counts():
    quiet_trainer(**OPTIONS, callbacks=[WassersteinDefense(recipe())]).fit(module := Skips(), loader())
    assert module.eps == pytest.approx(WARMUP[1::2])


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}], ids=str)
@pytest.mark.filterwarnings("error:.*self.log.*")
def test_without_step_logging_nothing_is_measured(options):
    class Silent(DigitsClassifier):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    passes = []
    module = Silent()
    module.register_forward_hook(lambda *args: passes.append(1))
    callbacks = [WassersteinDefense(Recipe(FGSM(THREAT), warmup_epochs=0), through="model")]
    quiet = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "callbacks": callbacks, **options}
    L.Trainer(**quiet, **({} if "barebones" in options else {"logger": False, "enable_checkpointing": False})).fit(
        module, loader()
    )
    assert len(passes) == 2 * 2  # the attack's and the step's


@pytest.mark.parametrize("mixin", [False, True])
def test_a_run_resumed_in_mid_epoch_goes_on(mixin, tmp_path):
    def run(epochs, ckpt=None, saver=()):
        module = Manual(2, 1) if mixin else Logged()
        callbacks = [*saver, *([] if mixin else [WassersteinDefense(recipe())])]
        trainer = quiet_trainer(
            **OPTIONS | {"max_epochs": epochs}, callbacks=callbacks, enable_checkpointing=bool(saver)
        )
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return module.eps

    run(1, saver=[ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6 if mixin else 3, save_top_k=-1)])
    (path,) = tmp_path.glob("*.ckpt")
    got = run(2, path)
    again = len(got) - 5  # Lightning 2.4 runs the batch of the checkpoint again
    assert again in (0, 1)
    assert got == pytest.approx(WARMUP[3:] + [0.2] * again)


@pytest.mark.parametrize("kind", ["undefended", "0.1.0"])
def test_checkpoints_that_did_not_count(kind, tmp_path):
    """Without the defense the warm-up is all to come; one of 0.1.0 has come as far as its trainer."""
    path = tmp_path / "last.ckpt"
    trainer = quiet_trainer(**OPTIONS | {"max_epochs": 1}, callbacks=[WassersteinDefense(recipe())] * (kind == "0.1.0"))
    trainer.fit(DigitsClassifier(), loader())
    trainer.save_checkpoint(path)
    if kind == "0.1.0":
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["callbacks"]["WassersteinDefense(None)"]["batches"]
        torch.save(checkpoint, path)
    trainer = quiet_trainer(**OPTIONS, callbacks=[WassersteinDefense(recipe())])
    trainer.fit(module := Logged(), loader(), ckpt_path=path)
    assert module.eps == pytest.approx(WARMUP[:4] if kind == "undefended" else WARMUP[4:])


def test_a_trainer_that_goes_on_goes_on_in_the_warm_up():
    trainer = quiet_trainer(**OPTIONS | {"max_epochs": 1}, callbacks=[defense := WassersteinDefense(recipe())])
    trainer.fit(module := Logged(), loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert module.eps == pytest.approx(WARMUP)
    quiet_trainer(**OPTIONS, callbacks=[defense]).fit(module := Logged(), loader())
    assert module.eps == pytest.approx(WARMUP)  # another trainer's run is a new one


@pytest.mark.parametrize(("name", "first"), [("udr", True), ("critic", False)], ids=["udr-before", "critic-after"])
def test_tuners_leave_no_trace(name, first, tmp_path):
    """Their trial batches are trained with the defense, and then taken back."""

    class Tunable(Logged):
        batch_size = 8

        def train_dataloader(self):
            return digits_loaders(self.batch_size, shuffle=False)[0]

        def val_dataloader(self):
            return digits_loaders(self.batch_size, val_size=8)[1]

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            states.append(plain(defense.state_dict()))
            pl_module.eps.clear()

    states: list[dict] = []
    tuners = [
        BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8),
        LearningRateFinder(num_training_steps=3, early_stop_threshold=None),
    ]
    defense = WassersteinDefense(Recipe.named(name, THREAT, warmup_epochs=1.5))
    callbacks = [defense, *tuners, Look()] if first else [*tuners, defense, Look()]
    trainer = quiet_trainer(**OPTIONS, callbacks=callbacks, default_root_dir=tmp_path, enable_checkpointing=True)
    trainer.fit(module := Tunable())
    assert states == [UNTRAINED]
    left = len(module.eps)  # Lightning 2.4 counts the finder's three batches as run
    assert left in (5, 8)
    assert module.eps == pytest.approx(WARMUP[:left])
    assert "training_step" not in module.__dict__


def test_a_live_defense_takes_a_state():
    class Reload(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                defense.load_state_dict({"batches": 5, "multiplier": 0.5, "critic": None})

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                seen.append(defense.state_dict()["multiplier"])

    seen: list[float] = []
    defense = WassersteinDefense(recipe(LagrangianAttack))
    quiet_trainer(**OPTIONS | {"max_epochs": 1}, callbacks=[defense, Reload()]).fit(module := Logged(), loader())
    assert seen == [0.5]
    assert module.eps == pytest.approx([*WARMUP[:2], *WARMUP[5:7]])


def test_the_mixin_outside_of_training():
    """There the radius is whole, and nothing is counted."""

    class Validated(Manual):
        def validation_step(self, batch, batch_idx):
            with torch.inference_mode(False):
                eps.append(self.defend(*(part.clone() for part in batch)).logs["eps"])

    eps: list[float] = []
    train, val = digits_loaders(batch_size=8, val_size=8)
    trainer = quiet_trainer(**OPTIONS, num_sanity_val_steps=1)
    trainer.fit(module := Validated(2, 1), train, val)
    assert module.eps == pytest.approx(WARMUP)
    trainer.validate(module, val, verbose=False)
    assert eps == pytest.approx([0.2] * 4)
    assert math.isclose(module.defend(*next(iter(val))).logs["eps"], 0.2)
