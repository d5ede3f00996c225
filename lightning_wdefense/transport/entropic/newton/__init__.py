"""The same for small problems on a CPU, by Newton's method in NumPy."""
