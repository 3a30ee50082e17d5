"""Tables and text for the terminal; in a file, lines are not wrapped."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 240


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; cells are plain text."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console().print(table)


def print_titled(title: str, text: str) -> None:
    """Print `text` below its title."""
    console().print(Text(title, style="bold"))
    console().print(Text(text), soft_wrap=True)


def console() -> Console:
    """Return the console for the terminal, or a wide one if output goes to a file."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_FILE_WIDTH)
