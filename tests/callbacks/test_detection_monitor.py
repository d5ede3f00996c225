"""What DetectionMonitor logs, against computations that share nothing with it, in the trainers that users have."""

from __future__ import annotations

import math
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from support.lightning_modules import (
    DigitsClassifier,
    HeadlessDigitsClassifier,
    digits_loaders,
    quiet_trainer,
    trained_classifier,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import DetectionMonitor, ThreatModel
from lightning_wdefense._compat import dataloader_suffix
from lightning_wdefense.attacks import PGD, get_attack
from lightning_wdefense.detection import CriticScore, Detector, FeatureSqueezing, KNNDistance, Mahalanobis

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)
SIGN_PGD = PGD(THREAT, steps=5, random_start=False)


class Contrast(Detector):
    """A user's own, fitted before training, which reads inputs: how far their contrast is from what it was in clean ones."""

    name, reads = "contrast", "inputs"

    def fit_layer(self, features: Tensor, labels: Tensor | None) -> Tensor:
        return features.std(1).mean()

    def score_layer(self, fitted: Tensor, features: Tensor) -> Tensor:
        return (features.std(1) - fitted).abs()


CLEAN = torch.cat([inputs for inputs, _ in digits_loaders()[1]])
FIVE = {
    "energy": "energy",
    "knn": KNNDistance(k=3),
    "squeezing": FeatureSqueezing(THREAT, bits=2),
    "mahalanobis": "mahalanobis",
    "contrast": Contrast().fit(CLEAN),
}


def watch(detectors=FIVE, attack=SIGN_PGD, **options) -> DetectionMonitor:
    return DetectionMonitor(THREAT, attack, detectors, **options)


def evaluate(
    monitor: DetectionMonitor, module=None, loaders=None, stage: str = "validate", **options
) -> dict[str, float]:
    trainer = quiet_trainer(callbacks=[monitor], **options)
    getattr(trainer, stage)(
        trained_classifier() if module is None else module, loaders or digits_loaders()[1], verbose=False
    )
    return {key: value.item() for key, value in trainer.callback_metrics.items() if "auroc" in key}


def by_hand(judged: Tensor | None = None) -> dict[str, float]:
    """On the validation set as one batch, of which ``judged`` says which samples are not learned from."""
    module = trained_classifier().eval()
    inputs, labels = (torch.cat(part) for part in zip(*digits_loaders()[1], strict=True))
    judged = torch.arange(len(inputs)) % 2 == 1 if judged is None else judged
    attacked = SIGN_PGD(module, inputs, labels)
    features = module.net[:-1]
    with torch.no_grad():
        right = judged & (module(inputs).argmax(1) == labels)
        broken = right & (module(attacked).argmax(1) != labels)
        clean, adversarial = inputs[right], attacked[broken]
        learned = features(inputs[~judged])
        neighbours = NearestNeighbors(n_neighbors=3).fit(learned)
        squeezing, mahalanobis = FeatureSqueezing(THREAT, module, bits=2), Mahalanobis().fit(learned, labels[~judged])
        scores = {
            "energy": [-module(x).logsumexp(1) for x in (clean, adversarial)],
            "knn": [torch.tensor(neighbours.kneighbors(features(x))[0][:, -1]) for x in (clean, adversarial)],
            "squeezing": [squeezing.score(x) for x in (clean, adversarial)],
            "mahalanobis": [mahalanobis.score(features(x)) for x in (clean, adversarial)],
            "contrast": [(x.flatten(1).std(1) - CLEAN.flatten(1).std(1).mean()).abs() for x in (clean, adversarial)],
        }
    assert 10 < len(adversarial) < len(clean)
    target = [0] * len(clean) + [1] * len(adversarial)
    values = {name: roc_auc_score(target, torch.cat(sides).tolist()) for name, sides in scores.items()}
    assert len(set(values.values())) == 5
    return values


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "val"), ("test", "test")])
def test_values_under_inference_mode(stage, prefix):
    monitor = watch()
    values = evaluate(monitor, stage=stage)
    assert values == {f"{prefix}/auroc_{name}": pytest.approx(value, abs=1e-3) for name, value in by_hand().items()}
    assert set(monitor.aurocs) == set(values)
    for key, (value, low, high) in monitor.aurocs.items():
        assert value.item() == pytest.approx(values[key])
        assert low <= value <= high


def test_values_in_fit():
    module = trained_classifier()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.net.head.bias.requires_grad_()
    module.learning_rate = 0.0
    trainer = quiet_trainer(callbacks=[watch()], limit_train_batches=1)
    trainer.fit(module, *digits_loaders())
    for name, value in by_hand().items():
        assert trainer.callback_metrics[f"val/auroc_{name}"].item() == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_the_size_of_the_batches_does_not_matter(batch_size):
    values = evaluate(watch(), loaders=digits_loaders(batch_size=batch_size)[1])
    assert values == {f"val/auroc_{name}": pytest.approx(value, abs=1e-3) for name, value in by_hand().items()}


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-mixed", 0.06), ("bf16-true", 0.1), ("64-true", 0.01)])
def test_precision(precision, tolerance):
    values = evaluate(watch(), precision=precision)
    for name, value in by_hand().items():
        assert values[f"val/auroc_{name}"] == pytest.approx(value, abs=tolerance)


@pytest.mark.slow  # the attacked batch is RobustnessMonitor's, which is compiled among the quick tests
def test_compiled_module():
    torch._dynamo.reset()
    values = evaluate(watch(), torch.compile(trained_classifier(), backend="eager"))
    assert values == {f"val/auroc_{name}": pytest.approx(value, abs=1e-3) for name, value in by_hand().items()}


def test_several_dataloaders_and_names():
    loaders = [digits_loaders(val_size=64)[1], digits_loaders(train_size=900, val_size=96)[1]]
    values = evaluate(watch(name="strong"), loaders=loaders)
    for index, loader in enumerate(loaders):
        alone = evaluate(watch(), loaders=loader)
        for name in FIVE:
            got = values[f"val/strong/auroc_{name}{dataloader_suffix(index)}"]
            assert got == pytest.approx(alone[f"val/auroc_{name}"], nan_ok=True)


def test_a_submodule_and_a_named_layer():
    module = HeadlessDigitsClassifier()
    module.load_state_dict(trained_classifier().state_dict())
    named = evaluate(watch(model="net", features="hidden_act"), module)
    assert named == {f"val/auroc_{name}": pytest.approx(value, abs=1e-3) for name, value in by_hand().items()}
    assert evaluate(watch(model="net", features="conv"), module)["val/auroc_knn"] != named["val/auroc_knn"]


def test_schedule_and_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/auroc_energy", mode="min", save_top_k=-1)
    calls = []

    class Counting(PGD):
        def perturb(self, problem):
            calls.append(len(problem.data))
            return super().perturb(problem)

    monitor = watch(["energy"], Counting(THREAT, steps=1), every_n_epochs=2, max_batches=1)
    trainer = quiet_trainer(
        callbacks=[monitor, checkpoint],
        max_epochs=3,
        limit_train_batches=10,
        num_sanity_val_steps=2,
        enable_checkpointing=True,
    )
    trainer.fit(trained_classifier(), *digits_loaders(val_size=64))  # one that is right of some: those are attacked
    assert len(calls) == 2
    assert max(calls) <= 16
    assert len(list(tmp_path.glob("*.ckpt"))) == 3


def test_validation_changes_nothing_in_training():
    def train(callbacks):
        L.seed_everything(3, verbose=False)
        module = DigitsClassifier(batch_norm=True)
        quiet_trainer(callbacks=callbacks, max_epochs=2, limit_train_batches=6).fit(
            module, *digits_loaders(val_size=64)
        )
        return module.state_dict(), torch.rand(1)

    (plain, draw), (watched, draw_watched) = train([]), train([watch()])
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    assert draw == draw_watched


def test_nothing_broken_is_nan():
    values = evaluate(watch(), loaders=digits_loaders(val_size=1)[1])
    assert all(math.isnan(value) for value in values.values())
    weak = DetectionMonitor(THREAT.with_eps(1e-6), "fgsm", FIVE)
    assert all(math.isnan(value) for value in evaluate(weak).values())


def test_a_diverged_model_does_not_end_the_run():
    module = trained_classifier()
    torch.nn.init.constant_(module.net.head.weight, float("nan"))
    torch.nn.init.constant_(module.net.hidden.weight, float("nan"))
    assert all(math.isnan(value) for value in evaluate(watch(), module).values())


def test_too_few_samples_of_a_class_are_a_warning():
    images, _ = next(iter(digits_loaders(batch_size=10)[1]))
    loader = DataLoader(TensorDataset(images, torch.arange(10)), 10)
    with pytest.warns(UserWarning, match=r"'mahalanobis' could not be fitted.*NaN.*Each class needs at least 2"):
        values = evaluate(watch(["energy", "mahalanobis"]), loaders=loader)
    assert math.isnan(values["val/auroc_mahalanobis"])


class Bare(DigitsClassifier):
    """Has neither a linear layer nor a convolution."""

    def __init__(self):
        super().__init__()
        del self.net
        self.matrix = torch.nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.flatten(1) @ self.matrix


def test_a_network_without_layers_is_watched_at_its_outputs():
    module = Bare()
    with pytest.warns(UserWarning, match=r"no nn\.Linear.*outputs"):
        values = evaluate(watch(), module)
    assert values == pytest.approx(evaluate(watch(features="outputs"), module), nan_ok=True)


CONSTRUCTION = {
    "unknown": (lambda: watch(["energie"]), ValueError, "no detector 'energie'. Did you mean 'energy'"),
    "string": (lambda: watch("energy"), ValueError, r"sequence or a mapping: write detectors=\['energy'\]"),
    "empty": (lambda: watch([]), ValueError, "detectors= is empty"),
    "two": (lambda: watch(["knn", KNNDistance(k=2)]), ValueError, "Two detectors are called 'knn'.*mapping"),
    "class": (lambda: watch([KNNDistance]), TypeError, "names and Detector objects"),
    "learns from inputs": (lambda: watch([Contrast()]), ValueError, "'contrast' must be fitted to inputs.*Fit the detector first"),
    "critic": (lambda: watch(["critic"]), ValueError, r"give CriticScore\(critic\)"),
    "unbounded attack": (lambda: watch(attack="n-fgsm"), ValueError, "leaves the threat model's ball"),
    "other threat": (lambda: watch(attack=PGD(THREAT.with_eps(0.2))), ValueError, "was made for"),
    "epochs": (lambda: watch(every_n_epochs=0), ValueError, "every_n_epochs must be at least 1, got 0"),
    "batches": (lambda: watch(max_batches=0), ValueError, "max_batches must be at least 1"),
    "no bounds": (lambda: DetectionMonitor(ThreatModel(bounds=None), detectors=["feature-squeezing"]), ValueError, "bounds=None"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", CONSTRUCTION)
def test_construction(mistake):
    make, kind, match = CONSTRUCTION[mistake]
    with pytest.raises(kind, match=match):
        make()


def test_scikit_learn_is_missed_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.covariance", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-wdefense\[detection\]"):
        watch(["mahalanobis"])


@pytest.mark.parametrize("options", [{"model": "nett"}, {"features": "net.hiden"}])
def test_a_path_that_does_not_exist_is_an_error_before_training(options):
    class Untrained(DigitsClassifier):
        def on_train_start(self):
            raise AssertionError("training started")

    with pytest.raises(ValueError, match="Did you mean"):
        quiet_trainer(callbacks=[watch(**options)]).fit(Untrained(), *digits_loaders())


def test_labels_of_pixels_are_refused():
    class Segmenter(DigitsClassifier):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv2d(1, 3, 3, padding=1)

        def validation_step(self, batch, batch_idx):
            pass

    loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.zeros(8, 8, 8, dtype=torch.long)), 4)
    with pytest.raises(ValueError, match=r"samples of one class each.*\(4, 8, 8\)"):
        evaluate(watch(features="outputs"), Segmenter(), loader)


def test_sharded_strategies_are_refused(monkeypatch):
    trainer = quiet_trainer()
    monkeypatch.setattr(type(trainer), "strategy", type("FSDPStrategy", (), {})())
    with pytest.raises(
        MisconfigurationException, match=r"DetectionMonitor cannot attack a model under FSDPStrategy: .*strategy='ddp'"
    ):
        watch().setup(trainer, trained_classifier(), "validate")


def test_a_critic_and_another_attack():
    critic = CriticScore(lambda features: -features.norm(dim=1))
    values = evaluate(watch([critic], get_attack("fgsm", THREAT)))
    assert 0 <= values["val/auroc_critic"] <= 1
