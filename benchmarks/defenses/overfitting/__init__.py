"""Benchmark: reweighting where adversarial training overfits."""
