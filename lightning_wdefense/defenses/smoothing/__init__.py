"""Wasserstein smoothing: randomised smoothing with flows of pixel mass, and its certificates."""
