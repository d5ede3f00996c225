"""Our AutoAttack against torchattacks' parts and the official code: verdicts on the same images, and time."""
