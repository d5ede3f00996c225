"""Sliced Wasserstein distances: one-dimensional optimal transport of projections on many directions."""
