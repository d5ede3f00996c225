"""Several ranks: the time of a step, the size from which rows are shared, and the traffic."""
