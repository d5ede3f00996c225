"""Benchmark: minimum-norm attacks against those of adv-lib and Foolbox, and the accuracy curve of one run against AutoAttack."""
