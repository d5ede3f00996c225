"""Weighted point clouds: read from what was passed, checked and padded, and multiplied without losing digits."""
