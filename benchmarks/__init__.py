"""Benchmarks, a folder each: ``python -m benchmarks.NAME``, from the root of the repository. What they found is in ``results``."""
