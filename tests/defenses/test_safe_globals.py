"""What a user keeps in ``save_hyperparameters()`` can be loaded with ``weights_only=True``."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
import torch
from support.lightning_modules import DigitsClassifier, quiet_trainer

from lightning_wdefense import Recipe, ThreatModel
from lightning_wdefense.attacks import PGD, Execution, get_attack
from lightning_wdefense.attacks.registry import ATTACKS
from lightning_wdefense.defenses import DISCREPANCIES, RECIPES
from lightning_wdefense.defenses.safe_globals import configuration_classes
from lightning_wdefense.transport import SinkhornDivergence, SlicedWasserstein

THREAT = ThreatModel(eps=0.1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
FLOW = ThreatModel("wasserstein", eps=0.1)


def attack(name):
    try:
        return get_attack(name, THREAT)
    except ValueError:
        return get_attack(name, FLOW)


def loaded(kept):
    torch.save(kept, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name):
    recipe = Recipe.named(name, THREAT, execution=Execution(precision="bf16"))
    assert loaded(recipe) == recipe


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack(name):
    assert loaded(attack(name)) == attack(name)


@pytest.mark.parametrize("name", DISCREPANCIES)
def test_every_discrepancy_by_name_and_as_an_object(name):
    for discrepancy in (name, DISCREPANCIES[name]):
        found = loaded(Recipe(PGD(THREAT), discrepancy=discrepancy, weight=1.0)).discrepancy
        assert found == discrepancy or repr(found) == repr(discrepancy)  # modules are equal only to themselves


@pytest.mark.parametrize("module", [SinkhornDivergence(label_cost=2.0), SlicedWasserstein(n_projections=3)], ids=repr)
def test_settings_of_a_discrepancy(module):
    found = loaded(Recipe(PGD(THREAT), discrepancy=module, weight=1.0)).discrepancy
    x, y = torch.rand(2, 4, 3).unbind()
    assert repr(found) == repr(module)
    if isinstance(module, SlicedWasserstein):
        assert torch.equal(found(x, y), module(x, y))


def test_nothing_of_others_is_let_in():
    @dataclass(frozen=True)
    class Theirs(PGD):
        pass

    assert Theirs not in configuration_classes()
    assert {cls.__module__.split(".")[0] for cls in configuration_classes()} == {"lightning_wdefense"}
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        loaded(replace(Recipe.named("pgd-at", THREAT), task_loss=torch.nn.functional.mse_loss))


def test_hyperparameters_are_loaded_and_resumed_from(tmp_path):
    class Net(DigitsClassifier):
        def __init__(self, threat, recipe):
            super().__init__()
            self.save_hyperparameters()

    path = tmp_path / "last.ckpt"
    trainer = quiet_trainer(max_epochs=0)
    trainer.fit(Net(THREAT, Recipe.named("sat", THREAT)), torch.utils.data.DataLoader([(torch.rand(1, 8, 8), 0)]))
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["threat"] == THREAT
    assert Net.load_from_checkpoint(path).hparams.recipe == Recipe.named("sat", THREAT)
