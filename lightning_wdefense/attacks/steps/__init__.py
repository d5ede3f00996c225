"""Attacks through a module's own step: where the adversary perturbs it, the inspection of the step, and the attack."""
