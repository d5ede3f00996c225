"""The Sinkhorn divergence and its gradients, against other libraries."""
