"""What a user's module, its random state and its loggers are, kept and put back: after us they are as before."""
