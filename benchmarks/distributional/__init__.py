"""Benchmark: recipes against an adversary that shares one Wasserstein budget over all images."""
