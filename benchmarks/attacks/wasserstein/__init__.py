"""Accuracy under Wasserstein attacks by budget: ours, and those published."""
