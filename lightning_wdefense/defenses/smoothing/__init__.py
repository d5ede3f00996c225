"""Randomised smoothing with Gaussian noise or with flows of pixel mass, and its certificates."""
