"""Lightning callbacks: they find tensors, call what is below, and log what comes back."""

from lightning_wdefense.callbacks.defense import WassersteinDefense
from lightning_wdefense.callbacks.detection import DetectionMonitor
from lightning_wdefense.callbacks.examples import AdversarialExampleLogger
from lightning_wdefense.callbacks.monitor import RobustnessMonitor

__all__ = ["AdversarialExampleLogger", "DetectionMonitor", "RobustnessMonitor", "WassersteinDefense"]
