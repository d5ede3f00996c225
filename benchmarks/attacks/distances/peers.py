"""The same attacks by other libraries, each as a function from a model and images to adversarial inputs."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_wdefense import ThreatModel

Side = Callable[[nn.Module, Tensor, Tensor, ThreatModel, int], Tensor]
ORDERS = {"linf": float("inf"), "l2": 2, "l1": 1}


def adv_lib(alpha: float) -> Side:
    """FMN of adv-lib, with the length of its first step."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))  # adv-lib imports it, for plots that are not made here
    from adv_lib.attacks.fast_minimum_norm import fmn

    def run(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int) -> Tensor:
        return fmn(model, x, y, norm=ORDERS[threat.norm], steps=steps, **{"α_init": alpha})

    return run


def foolbox(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """FMN of Foolbox."""
    import foolbox as fb

    attacks = {"linf": fb.attacks.LInfFMNAttack, "l2": fb.attacks.L2FMNAttack, "l1": fb.attacks.L1FMNAttack}
    wrapped = fb.PyTorchModel(model, bounds=(0, 1))
    with torch.enable_grad():
        return attacks[threat.norm](steps=steps)(wrapped, x, fb.criteria.Misclassification(y), epsilons=None)[1]
