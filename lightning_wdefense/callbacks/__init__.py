"""Lightning callbacks for robust training, robustness evaluation, detection and pictures of adversarial examples."""

from lightning_wdefense.callbacks.audit import RobustnessAudit
from lightning_wdefense.callbacks.defense import WassersteinDefense
from lightning_wdefense.callbacks.detection import DetectionMonitor
from lightning_wdefense.callbacks.examples import AdversarialExampleLogger
from lightning_wdefense.callbacks.monitor import RobustnessMonitor

__all__ = ["AdversarialExampleLogger", "DetectionMonitor", "RobustnessAudit", "RobustnessMonitor", "WassersteinDefense"]
