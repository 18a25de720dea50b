"""Where tables go: standard output, as wide as the terminal, or as wide as it takes in a file or pipe."""

from __future__ import annotations

from rich.console import Console

# What isn't a terminal has no width: what is cut off there would be lost.
_FILE_WIDTH = 250


def console() -> Console:
    """Standard output for tables."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=_FILE_WIDTH)
