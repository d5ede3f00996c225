"""For the shell: the command ``lightning-wdefense`` (evaluate, audit, compare), and a parser for LightningCLI whose errors name what was meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_wdefense.cli.command import main

if TYPE_CHECKING:
    from lightning_wdefense.cli.suggesting import SuggestingParser, suggestions

__all__ = ["SuggestingParser", "main", "suggestions"]


def __getattr__(name: str) -> Any:
    # Only when asked for: these need jsonargparse, without which the command still says what to install.
    if name not in ("SuggestingParser", "suggestions"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_wdefense.cli import suggesting

    return getattr(suggesting, name)
