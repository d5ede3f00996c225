"""The way on a GPU: all kernels of a divergence are queued before the host reads a result, or launched as one CUDA graph."""
