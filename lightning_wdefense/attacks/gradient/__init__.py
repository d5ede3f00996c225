"""Attacks that follow the gradient of a loss: within a norm ball, around it, or at a price."""
