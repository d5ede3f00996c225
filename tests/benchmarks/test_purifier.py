"""The benchmark of purifiers, on a budget of seconds: what it measures, what it writes, and that it resumes."""

from __future__ import annotations

import json

import torch
from torch import nn

from benchmarks.purifier import __main__ as purifier
from benchmarks.shared.data import Images
from benchmarks.shared.models import digits_cnn
from benchmarks.shared.protocol import PROTOCOLS
from lightning_wdefense.defenses import PurifiedClassifier

TINY = "--seeds 1 --train 450 --test 40 --epochs 6 --pgd-steps 5 --attack-steps 2 --queries 5"


def test_writes_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(purifier, "WIDTH", 64)
    arguments = [*TINY.split(), "--output", str(tmp_path)]
    purifier.main([*arguments, "--models", "no purifier", "trained as usual"])
    first = json.loads((tmp_path / "purifier_digits.json").read_text())["results"]
    assert set(first) == {"no purifier", "trained as usual"}
    usual = first["trained as usual"]["0"]
    assert usual["naive"] > usual["autoattack"] + 0.1

    def untrained(protocol, images, seed, names):
        assert names == ("trained through",), "what is known is not made again"
        return {name: PurifiedClassifier(nn.Identity(), digits_cnn()) for name in names}

    monkeypatch.setattr(purifier, "trained", untrained)
    purifier.main([*arguments, "--models", "no purifier", "trained as usual", "trained through"])
    both = json.loads((tmp_path / "purifier_digits.json").read_text())["results"]
    assert first.items() <= both.items()
    text = (tmp_path / "purifier_digits.md").read_text()
    assert "| trained through − trained as usual |" in text
    assert "python -m benchmarks.purifier --seeds 1 --epochs 6" in text


def test_naive_and_through_are_different_attacks():
    class Mirror(nn.Module):
        def forward(self, x):
            return 1 - x

    classifier = nn.Sequential(nn.Flatten(), nn.Linear(1, 4))  # class 1 above 1/2
    with torch.no_grad():
        classifier[1].weight.copy_(torch.tensor([[-9.0], [9.0], [0.0], [0.0]]))
        classifier[1].bias.copy_(torch.tensor([4.5, -4.5, -99.0, -99.0]))
    images = Images(torch.linspace(0.35, 0.45, 8).view(-1, 1, 1, 1), torch.ones(8, dtype=torch.long))
    found = purifier.measured(PROTOCOLS["digits"], PurifiedClassifier(Mirror(), classifier), images)
    # An attack that does not know of the mirror, or takes its gradient for the identity's, pushes the wrong way.
    assert found == {"clean": 1, "naive": 1, "bpda": 1, "pgd": 0, "autoattack": 0}
