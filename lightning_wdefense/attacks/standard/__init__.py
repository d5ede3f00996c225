"""Attacks of other libraries under our contract: torchattacks, and AutoAttack at its published settings."""
