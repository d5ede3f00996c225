"""A whole divergence queued on a GPU before anything is looked at, and recorded as a CUDA graph."""
