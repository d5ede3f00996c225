"""Weighted point clouds: reading and checking arguments, padding, and products in full precision."""
