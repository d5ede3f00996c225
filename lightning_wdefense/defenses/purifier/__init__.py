"""Generators that take an input to the clean distribution, their training, and the classifier behind one."""
