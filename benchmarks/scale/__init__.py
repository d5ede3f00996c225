"""Training at scale: several ranks, and long runs."""
