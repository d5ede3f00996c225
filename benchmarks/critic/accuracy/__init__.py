"""Robust accuracy of recipe ``critic`` over the settings of its critic."""
