"""Run and observe a user's module without changing it, run its steps as functions, and read its batches."""
