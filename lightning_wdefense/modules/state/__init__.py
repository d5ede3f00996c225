"""Save and restore the state of a user's module, of the random generators and of the loggers."""
