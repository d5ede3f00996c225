"""Distances between samples from kernels or pairwise distances: maximum mean discrepancy and energy distance."""
