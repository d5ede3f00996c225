"""Benchmarks of single attacks; each is a folder of its own."""
