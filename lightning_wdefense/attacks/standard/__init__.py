"""Attacks of the torchattacks library as :class:`Attack` objects, and AutoAttack with its published settings."""
