"""``python -m lightning_wdefense.cli``, the same as ``lightning-wdefense``."""

import sys

from lightning_wdefense.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
