"""What `evaluate` costs beside its attacks, and what is left of it when it is killed."""
