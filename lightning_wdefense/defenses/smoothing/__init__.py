"""Randomised smoothing with flows of mass: certificates against the Wasserstein adversary."""
