"""The metrics as attributes of a LightningModule, logged by it."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_wdefense.metrics import AttackSuccessRate, RobustAccuracy, TransportShift, robust_accuracy


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 3)
        self.robust = RobustAccuracy(("pgd",))
        self.success = AttackSuccessRate()
        self.shift = TransportShift()

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        adversarial = inputs + 0.5 * inputs.flip(1)
        clean_outputs, adversarial_outputs = self.net(inputs), self.net(adversarial)
        self.robust.update(clean_outputs, {"pgd": adversarial_outputs}, labels)
        self.success(clean_outputs, adversarial_outputs, labels)
        self.shift(inputs, adversarial)
        self.log_dict({"val/success": self.success, "val/shift": self.shift})

    def on_validation_epoch_end(self):
        self.log_dict({f"val/{name}": value for name, value in self.robust.compute().items()})
        self.robust.reset()


@pytest.mark.filterwarnings("ignore")
def test_logged_by_a_module(tmp_path):
    torch.manual_seed(0)
    inputs, labels = torch.randn(50, 4), torch.randint(3, (50,))
    model = Classifier()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=16)
    for _ in range(2):  # the second run starts from nothing again
        (logged,) = trainer.validate(model, loader, verbose=False)
        with torch.no_grad():
            clean, adversarial = model.net(inputs), model.net(inputs + 0.5 * inputs.flip(1))
        for name, value in robust_accuracy(clean, {"pgd": adversarial}, labels).items():
            assert logged[f"val/{name}"] == pytest.approx(value.item())
        assert logged["val/success"] == pytest.approx(1 - logged["val/pgd"] / logged["val/clean"])
        assert logged["val/shift"] > 0
    assert not [key for key in model.state_dict() if not key.startswith("net.")]
