"""The same model as attacks see it in different ways: averaged over its noise, its logits rescaled, its rounding seen through."""
