"""Gradients of paired and of transport losses: how steady and how meaningful they are."""
