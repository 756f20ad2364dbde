"""What a person sees on the terminal: bars with an estimate, and a table at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from diffusemix_pipeline.progress import Progress

_LONGEST_NAME = 20
console = Console(highlight=False, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Show a bar for each kind of long work, with the time it took and the time it still needs."""
    bars = Bars(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def tell(description: str, done: int, total: int) -> None:
        if description not in tasks:
            tasks[description] = bars.add_task(description, total=total)
        bars.update(tasks[description], completed=done, total=total)
        if not console.is_terminal and done == total:
            console.print(f"{description}: {done} done")

    with bars:
        yield tell


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; text is shown as it is, never read as markup."""
    table = Table(title=title or None, title_justify="left")
    for number, column in enumerate(columns):
        # Where the terminal is narrow, names stay whole and other columns give way.
        named = all(len(row[number]) <= _LONGEST_NAME and " " not in row[number] for row in rows)
        table.add_column(column, overflow="fold", no_wrap=named)
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
