"""An evaluation leaves the model, the random states and the grad mode as they were, whatever ends it."""

from __future__ import annotations

import pytest
import torch
from support.lightning_modules import digits_loaders, trained_classifier
from support.modules import Nasty, Snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense import ThreatModel, evaluate

pytestmark = pytest.mark.filterwarnings("ignore")

THREAT = ThreatModel(eps=0.1)


def loader() -> DataLoader:
    """Draws from the global random state for its order."""
    inputs = torch.rand(12, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, torch.arange(12) % 5), 4, shuffle=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fail_at", [None, 1, 3, 9, 20])
def test_everything_is_as_it_was(grad, fail_at):
    model = Nasty(6, fail_at=fail_at)
    with torch.set_grad_enabled(grad):
        before = Snapshot(model)
        if fail_at is None:
            evaluate(model, loader(), THREAT, ["pgd", "fgsm"], epsilons=[0.05], progress=False)
        else:
            with pytest.raises(RuntimeError, match="nasty failure"):
                evaluate(model, loader(), THREAT, ["pgd", "fgsm"], epsilons=[0.05], progress=False)
        before.check()
    assert model.forwards > 20 or model.forwards == fail_at


@pytest.mark.parametrize("where", ["model", "loader"])
def test_an_interruption_leaves_everything_as_it_was(where, capfd, monkeypatch):
    monkeypatch.setattr("lightning_wdefense.evaluation.progress.DELAY", 0.0)

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained_classifier(batch_norm=True).net
            self.net.act.eval()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if where == "model" and self.calls == 60:
                raise KeyboardInterrupt
            return self.net(x)

    def batches():
        for index, batch in enumerate(digits_loaders()[1]):
            torch.rand(1)
            if where == "loader" and index == 2:
                raise KeyboardInterrupt
            yield batch

    model = Interrupted()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, batches(), THREAT, epsilons=[0.05])
    before.check()
    assert "robustness" in capfd.readouterr().err  # the bar was shown, and is gone:
    assert not [bar for bar in __import__("tqdm").tqdm._instances if bar.desc.startswith("robustness")]
    where = None
    assert 0 <= evaluate(model, digits_loaders()[1], THREAT, progress=False).robust_acc <= 1


def test_no_hook_stays():
    model = trained_classifier().net
    evaluate(model, digits_loaders()[1], THREAT, max_batches=1, progress=False)
    assert not [it for it in model.modules() if it._forward_hooks or it._forward_pre_hooks]


def test_training_with_evaluations_is_the_same_bit_for_bit():
    def train(watched: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        train_loader, val_loader = digits_loaders(val_size=32)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10))
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            for inputs, labels in train_loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            if watched:
                evaluate(model, val_loader, THREAT, progress=False)
        return model.state_dict()

    plain, watched = train(False), train(True)
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
