"""The attack in the Wasserstein ball of images: local transport plans, the ascent over plans, and a check of the results."""
