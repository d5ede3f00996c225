"""Sliced Wasserstein distances: transport in one dimension, along many directions."""
