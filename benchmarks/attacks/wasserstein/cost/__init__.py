"""Time and memory of a step of the Wasserstein attack."""
