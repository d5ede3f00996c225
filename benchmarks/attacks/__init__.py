"""Benchmarks of the attacks themselves: their strength and their cost."""
