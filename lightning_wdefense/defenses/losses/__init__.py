"""What a recipe can add to its loss beside the discrepancy: weights of the samples, and the slope of the outputs."""
