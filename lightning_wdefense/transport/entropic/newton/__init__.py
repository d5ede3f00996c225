"""The solver for few small problems on a CPU: Newton's method in NumPy."""
