"""The parts that the monitors share: hooks, the route of the attack, the user's own metrics, Lightning's progress bars, pictures."""
