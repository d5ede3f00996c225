"""RobustnessMonitor in the trainers that users have: precisions, compiled modules, other namespaces; several processes: see test_ddp.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer, trained_classifier

from lightning_wdefense import RobustnessMonitor, ThreatModel, WassersteinDefense
from lightning_wdefense.attacks import PGD

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
SIGN_PGD = PGD(THREAT, steps=5, random_start=False)


def watch(**options) -> RobustnessMonitor:
    return RobustnessMonitor(THREAT, ["fgsm", SIGN_PGD], epsilons=[0.05, 0.2], **options)


def values_of_one_process() -> dict[str, float]:
    return quiet_trainer(callbacks=[watch()]).validate(trained_classifier(), digits_loaders()[1], verbose=False)[0]


@pytest.fixture(scope="module")
def plain() -> dict[str, float]:
    return values_of_one_process()


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16-mixed", 0.04), ("bf16-true", 0.08), ("16-true", 0.04), ("64-true", 0.01)]
)
def test_precision(plain, precision, tolerance):
    for stage, prefix in (("validate", "val"), ("test", "test")):
        trainer = quiet_trainer(callbacks=[watch()], precision=precision)
        values = getattr(trainer, stage)(trained_classifier(), digits_loaders()[1], verbose=False)[0]
        for key, value in plain.items():
            if "acc" in key or "auac" in key:
                assert values[key.replace("val", prefix)] == pytest.approx(value, abs=tolerance)


def test_attacks_run_the_model_in_the_trainers_precision():
    class Recording(DigitsClassifier):
        def forward(self, x):
            outputs = super().forward(x)
            self.dtypes.add(outputs.dtype)
            return outputs

        dtypes: set = set()  # noqa: RUF012

        def validation_step(self, batch, batch_idx):
            pass

    quiet_trainer(callbacks=[watch()], precision="bf16-mixed").validate(Recording(), digits_loaders()[1], verbose=False)
    assert Recording.dtypes == {torch.bfloat16}


def test_bf16_training_is_measured_and_not_disturbed():
    def train(callbacks):
        torch.manual_seed(0)
        module = DigitsClassifier(batch_norm=True)
        trainer = quiet_trainer(callbacks=callbacks, precision="bf16-mixed", max_epochs=2, limit_train_batches=5)
        trainer.fit(module, *digits_loaders(val_size=64))
        return trainer, module.state_dict()

    _, without = train([])
    trainer, watched = train([watch()])
    assert all(torch.equal(value, watched[key]) for key, value in without.items())
    assert 0 <= trainer.callback_metrics["val/robust_acc"] <= trainer.callback_metrics["val/clean_acc"]


@pytest.mark.parametrize("stage", [pytest.param("fit", marks=pytest.mark.slow), "validate"])
def test_compiled_module(plain, stage):
    torch._dynamo.reset()
    module = trained_classifier()
    module.learning_rate = 0.0
    trainer = quiet_trainer(callbacks=[watch()], limit_train_batches=1)
    loaders = digits_loaders() if stage == "fit" else digits_loaders()[1:]
    with torch._dynamo.config.patch(cache_size_limit=64):
        getattr(trainer, stage)(torch.compile(module, backend="eager"), *loaders)
    for key, value in plain.items():
        assert trainer.callback_metrics[key].item() == pytest.approx(value, rel=1e-4)


def test_compiled_code_is_not_compiled_again_for_every_batch():
    compiled = []

    def backend(graph, inputs):
        if "conv" in graph.code:  # the model's, not those of Lightning's own code for logging
            compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    # One attack on all samples, so that every batch has one size.
    monitor = RobustnessMonitor(THREAT, [SIGN_PGD], independent=True)
    counts = []
    for batches in (4, 8):
        torch._dynamo.reset()
        compiled.clear()
        trainer = quiet_trainer(callbacks=[monitor], limit_val_batches=batches)
        trainer.validate(torch.compile(trained_classifier(), backend=backend), digits_loaders(16)[1], verbose=False)
        counts.append(len(compiled))
    assert counts[1] == counts[0] > 0


def test_pytorch_lightning_trainer(plain):
    lightning_before = pytest.importorskip(
        "pytorch_lightning",
        minversion="2.6",
        reason="before Lightning 2.6 its trainers refuse the callbacks of the other namespace",
    )

    class OldStyle(lightning_before.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = trained_classifier().net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    trainer = lightning_before.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[watch(), WassersteinDefense("pgd-at", threat=THREAT)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=2,
        log_every_n_steps=1,
    )
    trainer.fit(OldStyle(), *digits_loaders())
    assert trainer.callback_metrics["val/robust_acc"].item() == pytest.approx(plain["val/robust_acc"])
    assert "defense/eps" in trainer.callback_metrics


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_extras():
    output = run_python(
        """
        import sys
        import support.lightning_alias
        import lightning, torchmetrics  # which look for what is installed, not for what can be imported
        for loaded in [name for name in sys.modules if name.startswith("matplotlib.")]:
            del sys.modules[loaded]
        for missing in ("wandb", "matplotlib", "torchattacks", "tensorboard", "jsonargparse", "rich"):
            sys.modules[missing] = None
        from support.lightning_modules import DigitsClassifier, digits_loaders, quiet_trainer
        from lightning_wdefense import AdversarialExampleLogger, RobustnessMonitor, ThreatModel, WassersteinDefense
        threat = ThreatModel(eps=0.1)
        monitor = RobustnessMonitor(threat, ["pgd"], epsilons=[0.1])
        callbacks = [monitor, AdversarialExampleLogger(threat), WassersteinDefense(threat=threat)]
        trainer = quiet_trainer(callbacks=callbacks, limit_train_batches=2, log_every_n_steps=1)
        trainer.fit(DigitsClassifier(), *digits_loaders(val_size=32))
        print(sorted(trainer.callback_metrics))
        from lightning_wdefense.attacks import AutoAttack, TorchAttack
        module, (inputs, labels) = DigitsClassifier().eval(), next(iter(digits_loaders()[1]))
        AutoAttack(threat, steps=2, queries=3)(module, inputs[:8], labels[:8])
        RobustnessMonitor(threat, ["autoattack"])
        try:
            TorchAttack("PGD", threat)
        except ImportError as error:
            print(error)
        """
    )
    assert "val/auac" in output
    assert "pip install" in output
    assert "lightning-wdefense[torchattacks]" in output


def test_a_diverged_model_is_measured_and_does_not_end_the_run():
    module = DigitsClassifier()
    torch.nn.init.constant_(module.net.head.weight, float("nan"))
    torch.nn.init.constant_(module.net.hidden.weight, float("nan"))
    values = quiet_trainer(callbacks=[RobustnessMonitor(ThreatModel(eps=0.1))]).validate(
        module, digits_loaders()[1], verbose=False
    )[0]
    assert "val/robust_acc" in values
    assert math.isnan(values["val/transport_shift"])
