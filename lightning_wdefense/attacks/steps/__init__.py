"""Attacks on a user's own training step: where its inputs are, what a first look at it measures, and the adversary through it."""
