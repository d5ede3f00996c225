"""Minimum-norm attacks: how far each sample is from being misclassified."""
