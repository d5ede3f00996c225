"""The stages of ``benchmarks/gpu.py``, in order of worth. Each is a process of its own."""
