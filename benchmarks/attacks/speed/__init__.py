"""Time of a PGD step, against torchattacks, Foolbox and a loop written by hand."""
