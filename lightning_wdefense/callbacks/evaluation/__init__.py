"""What all monitors share: which batches they are given, the model as it is, attacks on a copy of the step, and pictures."""
