"""The value as a differentiable function: first derivatives by the envelope theorem, second ones by the implicit function theorem."""
