"""The benchmark of detectability, on a budget of seconds: what it writes, that it resumes, and what it leaves out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.detectability.__main__ import DETECTOR_NAMES, main
from benchmarks.detectability.attacks import SPECS, Evading, matching_eps
from benchmarks.detectability.report import differences, groups
from lightning_wdefense.attacks import ATTACKS
from lightning_wdefense.attacks.losses import margin
from lightning_wdefense.detection import Energy

TINY = (
    "--models undefended --success 0.5 --seeds 1 --train 400 --epochs 3 --validation 40 --matched 32 --test 60 --learned 200 --bisections 2 "
    "--batch 8 --batches 2 --reference 16"
)


def test_writes_resumes_and_leaves_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SPECS, "unheard-of", SPECS["pgd-linf"].__class__("unheard-of", "linf", 0.1))
    monkeypatch.setitem(
        ATTACKS, "unwilling", lambda threat, **options: ATTACKS["feature-scattering"](threat, **options)
    )
    monkeypatch.setitem(SPECS, "unwilling", SPECS["pgd-linf"].__class__("unwilling", "linf", 0.05))
    arguments = [*TINY.split(), "--attacks", "pgd-linf", "unheard-of", "unwilling"]
    arguments += ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    main(arguments)
    assert "'unheard-of' is not registered" in capsys.readouterr().err
    result = json.loads((tmp_path / "results" / "detectability_digits.json").read_text())
    informed, unwilling = result["cells"]
    assert 0.2 < informed["reached"] < 0.9
    for name in DETECTOR_NAMES:
        value, low, high = informed["plain"][name]
        assert 0 <= low <= value <= high <= 1
        assert informed["adaptive"][name][0] <= value + 1e-6
        assert unwilling["adaptive"][name] is None
    assert informed["adaptive"] != informed["plain"]
    text = (tmp_path / "results" / "detectability_digits.md").read_text()
    assert "Left out: attack 'unheard-of'" in text
    assert (tmp_path / "results" / "detectability_digits.png").stat().st_size > 10_000

    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    again = json.loads((tmp_path / "results" / "detectability_digits.json").read_text())
    assert again["cells"] == result["cells"]


def test_the_radius_of_a_linear_model_is_known():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.5, -0.5]))
    x = torch.linspace(0.51, 1.0, 50).view(-1, 1, 1, 1)  # classified by x > 1/2, and so 0.01 to 0.5 away from it
    eps = matching_eps(SPECS["pgd-linf"], model, x, torch.ones(50, dtype=torch.long), 0.6, 8)
    assert eps == pytest.approx(0.3, abs=0.012)
    assert (
        matching_eps(
            SPECS["pgd-linf"],
            nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval(),
            x * 0,
            torch.zeros(50).long(),
            2.0,
            1,
        )
        is None
    )


def test_evading_keeps_attacking_until_it_has_won():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    values = Evading(Energy(), 3.0)(SimpleNamespace(logits=logits, features=None, inputs=None), labels)
    torch.testing.assert_close(values, margin(logits, labels) + 3 * logits.logsumexp(1))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    expected[1] += 3 * logits[1].detach().softmax(0)
    torch.testing.assert_close(gradient, expected)


def test_differences_are_paired_by_model():
    def cell(attack: str, seed: int, auroc: float) -> dict:
        values = {"knn": [auroc, 0.0, 1.0], "lid": None}
        return {"model": "linf", "attack": attack, "success": 0.9, "seed": seed, "plain": values, "adaptive": values}

    cells = [cell("wasserstein", 0, 0.6), cell("wasserstein", 1, 0.7), cell("pgd-l2", 0, 0.65), cell("pgd-l2", 1, 0.77)]
    text = differences(groups(cells), ["knn", "lid"])
    # Differences of -5 and -7: their mean, and t with one degree of freedom times the standard error of 1.
    assert "| linf | pgd-l2 | 90% | non-adaptive | 2 | -6.0 ± 12.7 | - |" in text
    assert "| linf | wasserstein |" not in text
