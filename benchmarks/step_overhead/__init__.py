"""A training step with the callback, against a loop written by hand."""
