"""For the shell: a parser for LightningCLI whose errors name the arguments that a misspelt key is nearest to."""

from lightning_wdefense.cli.suggestions import SuggestingParser, suggestions

__all__ = ["SuggestingParser", "suggestions"]
