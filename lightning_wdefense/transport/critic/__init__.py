"""Estimates of the 1-Wasserstein distance from its dual problem: 1-Lipschitz critics and their training."""
