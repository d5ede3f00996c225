"""Measures a model by attacks: attacked batches, the protocol, the metrics and the result; with or without a Trainer."""
