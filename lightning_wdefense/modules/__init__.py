"""How a user's module is run, watched, and left as it was; its batches."""
