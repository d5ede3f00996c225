"""The dual way to the Wasserstein-1 distance: critics that are Lipschitz by their weights or by a penalty, and their training."""
