"""Tables of commands on standard output."""

import sys
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[str] = (),
    title: str | None = None,
    show_header: bool = True,
) -> None:
    """Prints a table without lines, as wide as the terminal, or 160 columns if the output is not a terminal.

    The columns whose headings are in `left` are aligned to the left; the others have numbers.
    """
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), show_header=show_header)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Names of files and classes may contain brackets, which are not markup here.
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def cell(value: float | None, form: str) -> str:
    """Formats a number; empty if it is not known."""
    return "" if value is None else form.format(value)
