"""The value as a differentiable function: first derivatives by the envelope theorem, second derivatives by the implicit function theorem."""
