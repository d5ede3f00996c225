"""Robust accuracy and cost of all recipes, under one protocol."""
