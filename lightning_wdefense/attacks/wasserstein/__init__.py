"""Attacks that move the mass of an image: local transport plans, the ways to find the worst one, and what is feasible."""
