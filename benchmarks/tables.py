"""How a result is shown to whoever asked for it: one table to a benchmark, each row a line."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.machine import headline


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], machine: dict[str, object], words: int = 1
) -> Table:
    """What it is of above, what it was measured on below.

    Args:
        rows: a cell for each column; None was not measured.
        machine: as ``described`` tells it.
        words: columns at the left that aren't figures.
    """
    made = Table(title=title, caption=headline(machine))
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*("–" if cell is None else str(cell) for cell in row))
    return made
