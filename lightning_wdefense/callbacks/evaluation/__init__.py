"""The parts that the monitors share: attacked batches, the route of the attack, the user's own metrics, progress, pictures."""
