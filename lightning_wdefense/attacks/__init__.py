"""Adversarial inputs for any callable model: ``attack(model, inputs, labels) -> adversarial inputs``."""

from lightning_wdefense.attacks.base import Attack
from lightning_wdefense.attacks.gradient.feature_scattering import FeatureScattering
from lightning_wdefense.attacks.gradient.fgsm import FGSM
from lightning_wdefense.attacks.gradient.gibbs_noise import GibbsNoise
from lightning_wdefense.attacks.gradient.lagrangian import LagrangianAttack
from lightning_wdefense.attacks.gradient.pgd import PGD
from lightning_wdefense.attacks.gradient.shared_budget import SharedBudgetPGD
from lightning_wdefense.attacks.gradient.sinkhorn import SinkhornAttack
from lightning_wdefense.attacks.gradient.soft_ball import SoftBallPGD
from lightning_wdefense.attacks.minimal.base import MinimalAttack, MinimalPerturbation
from lightning_wdefense.attacks.minimal.ddn import DDN
from lightning_wdefense.attacks.minimal.fmn import FMN
from lightning_wdefense.attacks.minimal.minimal_eps import MinimalEps
from lightning_wdefense.attacks.minimal.registry import MINIMAL_ATTACKS, get_minimal_attack
from lightning_wdefense.attacks.multiplier import LearnedAttack
from lightning_wdefense.attacks.registry import ATTACKS, get_attack
from lightning_wdefense.attacks.standard.apgd import APGD
from lightning_wdefense.attacks.standard.autoattack import AutoAttack
from lightning_wdefense.attacks.standard.fab import FAB
from lightning_wdefense.attacks.standard.square import Square
from lightning_wdefense.attacks.standard.torchattack import TorchAttack
from lightning_wdefense.attacks.steps.sites import Perturb
from lightning_wdefense.attacks.threat import ThreatModel
from lightning_wdefense.attacks.wasserstein.attack import WassersteinAttack
from lightning_wdefense.attacks.wasserstein.feasibility import wasserstein_feasibility
from lightning_wdefense.attacks.worst_case import WorstCase, worst_case
from lightning_wdefense.modules.execution import Execution

__all__ = [
    "APGD",
    "ATTACKS",
    "DDN",
    "FAB",
    "FGSM",
    "FMN",
    "MINIMAL_ATTACKS",
    "PGD",
    "Attack",
    "AutoAttack",
    "Execution",
    "FeatureScattering",
    "GibbsNoise",
    "LagrangianAttack",
    "LearnedAttack",
    "MinimalAttack",
    "MinimalEps",
    "MinimalPerturbation",
    "Perturb",
    "SharedBudgetPGD",
    "SinkhornAttack",
    "SoftBallPGD",
    "Square",
    "ThreatModel",
    "TorchAttack",
    "WassersteinAttack",
    "WorstCase",
    "get_attack",
    "get_minimal_attack",
    "wasserstein_feasibility",
    "worst_case",
]
