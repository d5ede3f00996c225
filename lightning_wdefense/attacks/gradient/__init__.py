"""Attacks that follow the gradient of a loss, inside a norm ball or with a penalty on the distance."""
