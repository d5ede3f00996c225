"""Purifiers under attacks that go through them."""
