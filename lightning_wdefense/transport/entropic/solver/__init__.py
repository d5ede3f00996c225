"""Dual potentials by Sinkhorn's iteration in PyTorch, and the value and gradients that follow from them."""
