"""What the command works on: models, checkpoints, data modules and folders of images."""

from lightning_wdefense.cli.loading.checkpoints import Checkpoint
from lightning_wdefense.cli.loading.exported import ExportedModel
from lightning_wdefense.cli.loading.images import ImageFolder
from lightning_wdefense.cli.loading.loaders import loader_of
from lightning_wdefense.cli.loading.models import model_of, twin_of

__all__ = ["Checkpoint", "ExportedModel", "ImageFolder", "loader_of", "model_of", "twin_of"]
