"""How sensitive a critic is to its settings: the error of its distance, and robust accuracy."""
