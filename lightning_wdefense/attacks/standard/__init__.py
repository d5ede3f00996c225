"""The attacks that robustness claims are judged by (APGD, FAB, Square and AutoAttack), and those of the torchattacks library."""
