"""The numbers that RobustnessMonitor logs, against computations that share nothing with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import accuracy_score
from support.lightning_modules import (
    DigitsClassifier,
    HeadlessDigitsClassifier,
    digits_loaders,
    quiet_trainer,
    trained_classifier,
    unpack,
)
from torch import Tensor, nn

from lightning_wdefense import RobustnessMonitor, ThreatModel
from lightning_wdefense._compat import dataloader_suffix
from lightning_wdefense.attacks import FGSM, PGD
from lightning_wdefense.callbacks.schedule import evaluation_generator
from lightning_wdefense.transport import sinkhorn_divergence

pytestmark = pytest.mark.filterwarnings("ignore")

EPS, STEPS = 0.1, 5
THREAT = ThreatModel(eps=EPS)
SIGN_PGD = PGD(THREAT, steps=STEPS, step_size=EPS / 2, random_start=False)


def sign_pgd(module: nn.Module, inputs: Tensor, labels: Tensor, eps: float, steps: int, step: float) -> Tensor:
    """Projected gradient descent without a random start, as anyone would write it."""
    module.eval()
    point = inputs.clone()
    for _ in range(steps):
        point.requires_grad_()
        loss = nn.functional.cross_entropy(module(point), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        point = (point.detach() + step * gradient.sign()).clamp(inputs - eps, inputs + eps).clamp(0, 1)
    return point


def whole_set(**options) -> tuple[Tensor, Tensor]:
    """The validation set as one batch."""
    inputs, labels = zip(*digits_loaders(**options)[1], strict=True)
    return torch.cat(inputs), torch.cat(labels)


def predicted(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module.eval()(inputs).argmax(1)


def evaluate(monitor: RobustnessMonitor, module=None, loaders=None, stage: str = "validate", **options) -> dict:
    trainer = quiet_trainer(callbacks=[monitor], **options)
    getattr(trainer, stage)(module or trained_classifier(), loaders or digits_loaders()[1], verbose=False)
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def by_hand() -> dict[str, float]:
    """What is right on the whole validation set: clean, after FGSM, after PGD, after both, and what else is logged."""
    module, (inputs, labels) = trained_classifier(), whole_set()
    attacked = {
        "fgsm": sign_pgd(module, inputs, labels, EPS, 1, EPS),
        "pgd": sign_pgd(module, inputs, labels, EPS, STEPS, EPS / 2),
    }
    clean = predicted(module, inputs) == labels
    right = {name: clean & (predicted(module, it) == labels) for name, it in attacked.items()}
    both = right["fgsm"] & right["pgd"]
    values = {
        "clean": accuracy_score(labels, predicted(module, inputs)),
        "fgsm": right["fgsm"].float().mean().item(),
        "pgd": right["pgd"].float().mean().item(),
        "both": both.float().mean().item(),
        "success": 1 - both.sum().item() / clean.sum().item(),
    }
    # The one that broke a sample, else the last one, on what was right on clean inputs.
    worst = torch.where(right["fgsm"][:, None, None, None], attacked["pgd"], attacked["fgsm"])[clean]
    features = module.net[:-1]
    with torch.no_grad():
        values["shift"] = float(sinkhorn_divergence(features(inputs[clean]), features(worst)))
    assert values["clean"] > values["fgsm"] > values["pgd"] > 0.2  # else the tests below would show little
    return values


@pytest.mark.parametrize(("stage", "prefix"), [("validate", "val"), ("test", "test")])
def test_values_under_inference_mode(by_hand, stage, prefix):
    values = evaluate(RobustnessMonitor(THREAT, {"fgsm": "fgsm", "strong": SIGN_PGD}), stage=stage)
    assert values.pop(f"robust/{prefix}/loss") > values.pop(f"{prefix}/loss")
    assert values == {
        f"{prefix}/clean_acc": pytest.approx(by_hand["clean"]),
        f"{prefix}/robust_acc": pytest.approx(by_hand["both"]),
        f"{prefix}/robust_acc_fgsm": pytest.approx(by_hand["fgsm"]),
        f"{prefix}/robust_acc_strong": pytest.approx(by_hand["both"]),
        f"{prefix}/attack_success": pytest.approx(by_hand["success"]),
        f"{prefix}/transport_shift": pytest.approx(by_hand["shift"], rel=1e-3),
    }


def test_values_in_fit(by_hand):
    module = trained_classifier()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.net.head.bias.requires_grad_()
    module.learning_rate = 0.0
    trainer = quiet_trainer(callbacks=[RobustnessMonitor(THREAT, [FGSM(THREAT), SIGN_PGD])], limit_train_batches=1)
    trainer.fit(module, *digits_loaders())
    assert trainer.callback_metrics["val/robust_acc"].item() == pytest.approx(by_hand["both"])
    assert trainer.callback_metrics["val/clean_acc"].item() == pytest.approx(by_hand["clean"])


def test_order_says_what_is_left_and_independent_what_each_leaves(by_hand):
    # PGD first: in order mode FGSM then starts from what PGD left.
    attacks = {"pgd": SIGN_PGD, "fgsm": "fgsm"}
    in_order = evaluate(RobustnessMonitor(THREAT, attacks))
    alone = evaluate(RobustnessMonitor(THREAT, attacks, independent=True))
    assert in_order["val/robust_acc_pgd"] == alone["val/robust_acc_pgd"] == pytest.approx(by_hand["pgd"])
    assert in_order["val/robust_acc_fgsm"] == pytest.approx(by_hand["both"])
    assert alone["val/robust_acc_fgsm"] == pytest.approx(by_hand["fgsm"])
    assert in_order["val/robust_acc"] == alone["val/robust_acc"] == pytest.approx(by_hand["both"])


def test_only_what_is_left_is_attacked(by_hand):
    sizes = {"first": 0, "second": 0}

    class Counting(PGD):
        def perturb(self, problem):
            sizes[self.label] += len(problem.data)
            return super().perturb(problem)

    attacks = {name: Counting(THREAT, steps=STEPS, step_size=EPS / 2, random_start=False) for name in sizes}
    for name, attack in attacks.items():
        object.__setattr__(attack, "label", name)
    n = len(whole_set()[1])
    evaluate(RobustnessMonitor(THREAT, attacks, features=None))
    assert sizes == {"first": n, "second": round(n * by_hand["pgd"])}
    sizes.update(first=0, second=0)
    evaluate(RobustnessMonitor(THREAT, attacks, features=None, independent=True))
    assert sizes == {"first": n, "second": round(n * by_hand["clean"])}


def test_noise_is_the_same_each_time_and_another_seed_is_another():
    def weak(seed: int) -> dict:
        return evaluate(RobustnessMonitor(THREAT, [PGD(THREAT, steps=1, step_size=1e-4)], seed=seed))

    torch.manual_seed(1)
    first = weak(0)
    torch.manual_seed(2)
    assert weak(0) == first
    assert weak(1) != first


def test_noise_differs_between_batches_dataloaders_and_ranks_but_not_between_epochs():
    def draw(rank=0, epoch=0, seed=0, batch_idx=0, dataloader_idx=0) -> float:
        trainer = SimpleNamespace(global_rank=rank, current_epoch=epoch, global_step=epoch)
        generator = evaluation_generator(trainer, seed, batch_idx, dataloader_idx, torch.device("cpu"))
        return torch.rand(1, generator=generator).item()

    others = [draw(rank=1), draw(seed=1), draw(batch_idx=1), draw(dataloader_idx=1), draw()]
    assert len(set(others)) == len(others)
    assert draw(epoch=3) == draw()


def test_several_dataloaders():
    loaders = [digits_loaders(val_size=64)[1], digits_loaders(train_size=900, val_size=96, batch_size=16)[1]]
    monitor = RobustnessMonitor(THREAT, [SIGN_PGD], epsilons=[EPS])
    values = evaluate(monitor, loaders=loaders)
    for index, loader in enumerate(loaders):
        alone = evaluate(RobustnessMonitor(THREAT, [SIGN_PGD], epsilons=[EPS]), loaders=loader)
        for key in ("clean_acc", "robust_acc", "robust_acc_pgd", "attack_success", "transport_shift", "auac"):
            assert values[f"val/{key}{dataloader_suffix(index)}"] == pytest.approx(alone[f"val/{key}"], rel=1e-5)
    assert set(monitor.curves) == {f"val/robustness_curve{dataloader_suffix(index)}" for index in (0, 1)}
    # What another evaluation measured is not logged again.
    assert not [key for key in evaluate(monitor, loaders=loaders[0]) if "dataloader" in key]


def test_max_batches_is_for_each_dataloader():
    monitor = RobustnessMonitor(THREAT, [SIGN_PGD], max_batches=2)
    values = evaluate(monitor, loaders=[digits_loaders(batch_size=8)[1]] * 2)
    first = evaluate(RobustnessMonitor(THREAT, [SIGN_PGD]), loaders=digits_loaders(val_size=16)[1])
    for key in ("clean_acc", "robust_acc", "attack_success"):
        assert values[f"val/{key}{dataloader_suffix(0)}"] == values[f"val/{key}{dataloader_suffix(1)}"]
        assert values[f"val/{key}{dataloader_suffix(1)}"] == first[f"val/{key}"]


def test_name_tells_monitors_apart():
    monitors = [RobustnessMonitor(THREAT.with_eps(eps), ["fgsm"], name=str(eps)) for eps in (0.02, 0.2)]
    trainer = quiet_trainer(callbacks=monitors)
    trainer.validate(trained_classifier(), digits_loaders()[1], verbose=False)
    values = trainer.callback_metrics
    assert values["val/0.02/robust_acc"] > values["val/0.2/robust_acc"]
    assert values["val/0.02/clean_acc"] == values["val/0.2/clean_acc"]
    assert len({monitor.state_key for monitor in monitors}) == 2


@pytest.mark.parametrize("format", ["list", "dict", "dataclass", "namedtuple"])
def test_batches_of_any_format(by_hand, format):
    values = evaluate(RobustnessMonitor(THREAT, ["fgsm"]), loaders=digits_loaders(format=format)[1])
    assert values["val/robust_acc"] == pytest.approx(by_hand["fgsm"])


def test_a_module_that_calls_a_submodule(by_hand):
    module = HeadlessDigitsClassifier()
    module.load_state_dict(trained_classifier().state_dict())
    values = evaluate(RobustnessMonitor(THREAT, ["fgsm"], model="net"), module)
    assert values["val/robust_acc"] == pytest.approx(by_hand["fgsm"])


def test_a_submodule_that_configure_model_makes(by_hand):
    class Late(HeadlessDigitsClassifier):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = trained_classifier().net

    values = evaluate(RobustnessMonitor(THREAT, ["fgsm"], model="net"), Late())
    assert values["val/robust_acc"] == pytest.approx(by_hand["fgsm"])


# ---------------------------------------------------------------------------------------------- the accuracy curve


def test_curve_and_area_by_hand(by_hand):
    epsilons = [0.2, 0.05, EPS]  # sorted by the monitor; 0 is added
    monitor = RobustnessMonitor(THREAT, [SIGN_PGD], epsilons=epsilons)
    values = evaluate(monitor)
    module, (inputs, labels) = trained_classifier(), whole_set()
    left, expected = predicted(module, inputs) == labels, []
    expected.append(left.float().mean().item())
    for eps in sorted(epsilons):
        left &= predicted(module, sign_pgd(module, inputs, labels, eps, STEPS, eps / 2)) == labels
        expected.append(left.float().mean().item())
    curve = monitor.curves["val/robustness_curve"]
    assert curve.epsilons.tolist() == pytest.approx([0.0, 0.05, EPS, 0.2])
    assert curve.accuracies.tolist() == pytest.approx(expected)
    assert sorted(expected, reverse=True) == expected
    a, b, c, d = expected
    area = 0.05 * (a + b) / 2 + 0.05 * (b + c) / 2 + 0.1 * (c + d) / 2
    assert values["val/auac"] == pytest.approx(area / 0.2)


def test_curve_reuses_what_is_known_at_the_threats_eps():
    calls = []

    class Counting(PGD):
        def perturb(self, problem):
            calls.append(self.threat.eps)
            return super().perturb(problem)

    attack = Counting(THREAT, steps=2, random_start=False)
    evaluate(RobustnessMonitor(THREAT, [attack], epsilons=[0.0, 0.05, EPS]), loaders=digits_loaders(batch_size=128)[1])
    assert sorted(calls) == [0.05, EPS]


def test_curve_attacks_only_what_stands(by_hand):
    sizes = dict.fromkeys((0.05, EPS, 0.2), 0)

    class Counting(PGD):
        def perturb(self, problem):
            sizes[self.threat.eps] += len(problem.data)
            return super().perturb(problem)

    monitor = RobustnessMonitor(THREAT, [Counting(THREAT, steps=2, random_start=False)], epsilons=[0.05, 0.2])
    evaluate(monitor)
    n, right = len(whole_set()[1]), by_hand["clean"]
    low = monitor.curves["val/robustness_curve"].accuracies[1].item()
    assert low < right
    assert sizes == {0.05: round(n * right), EPS: n, 0.2: round(n * low)}


def test_curve_never_rises_even_if_the_attack_does():
    class Erratic(FGSM):
        def perturb(self, problem):
            return problem.data if self.threat.eps > 0.1 else super().perturb(problem)

    monitor = RobustnessMonitor(THREAT, [Erratic(THREAT)], epsilons=[0.05, 0.1, 0.2])
    evaluate(monitor)
    _, low, middle, high = monitor.curves["val/robustness_curve"].accuracies.tolist()
    assert low > middle == high


# ------------------------------------------------------------------------------------------- the transport shift


def test_no_features_no_shift():
    assert "val/transport_shift" not in evaluate(RobustnessMonitor(THREAT, ["fgsm"], features=None))


def test_shift_of_a_named_layer():
    module, (inputs, labels) = trained_classifier(), whole_set()
    right = predicted(module, inputs) == labels
    attacked = sign_pgd(module, inputs, labels, EPS, 1, EPS)
    with torch.no_grad():
        expected = sinkhorn_divergence(*(module.net.conv(it[right]).flatten(1) for it in (inputs, attacked)))
    values = evaluate(RobustnessMonitor(THREAT, ["fgsm"], features="net.conv"))
    assert values["val/transport_shift"] == pytest.approx(expected.item(), rel=1e-3)


class Bare(DigitsClassifier):
    """Has neither a linear layer nor a convolution."""

    def __init__(self):
        super().__init__()
        del self.net
        self.matrix = nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.flatten(1) @ self.matrix


def test_a_network_without_layers_is_measured_on_its_outputs():
    module = Bare()
    monitor = RobustnessMonitor(THREAT, ["fgsm"])
    with pytest.warns(UserWarning, match=r"no nn\.Linear.*outputs"):
        values = evaluate(monitor, module)
    assert values == evaluate(RobustnessMonitor(THREAT, ["fgsm"], features="outputs"), module)
    assert values["val/transport_shift"] > 0


def test_nothing_right_leaves_nothing_to_attack():
    class Wrong(DigitsClassifier):
        def forward(self, x):
            return super().forward(x) * 0 + nn.functional.one_hot(torch.tensor(9), 10) * 20.0

    module = Wrong()
    inputs, labels = whole_set()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs[labels != 9], labels[labels != 9]), 32)
    values = evaluate(RobustnessMonitor(THREAT, ["fgsm"], epsilons=[EPS, 0.2]), module, loader)
    assert values["val/clean_acc"] == values["val/robust_acc"] == values["val/auac"] == 0
    assert torch.tensor([values["val/attack_success"], values["val/transport_shift"]]).isnan().all()


def test_soft_labels_and_normalised_inputs(by_hand):
    mean, std = 0.3, 0.4

    class Normalising(DigitsClassifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            inputs, labels = unpack(batch)
            return (inputs - mean) / std, nn.functional.one_hot(labels, 10).float()

        def forward(self, x):
            return super().forward(x * std + mean)

    module = Normalising()
    module.load_state_dict(trained_classifier().state_dict())
    values = evaluate(RobustnessMonitor(ThreatModel(eps=EPS, mean=mean, std=std), ["fgsm"]), module)
    assert values["val/robust_acc"] == pytest.approx(by_hand["fgsm"])
