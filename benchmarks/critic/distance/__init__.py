"""Error of a critic's distance between two Gaussians."""
