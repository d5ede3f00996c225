"""Adversarial robustness by optimal transport for PyTorch Lightning."""

__version__ = "0.1.0"
