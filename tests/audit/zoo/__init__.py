"""Models whose robustness is known to be false, and models whose robustness is honest, for the audit to tell apart."""
