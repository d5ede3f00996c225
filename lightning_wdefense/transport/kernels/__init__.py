"""Kernel distances between samples: the maximum mean discrepancy and the energy distance."""
