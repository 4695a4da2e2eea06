"""A progress bar for work that takes more than a moment, on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(what: str, total: int | None, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar named `what`; the block calls the function it gets with the number of steps done. `total` None: a spinner.

    Where standard error is not a terminal (a log file, a cluster job) one line says what was begun instead.
    """
    console = Console(file=sys.stderr)
    if show and not (console.is_terminal or console.is_jupyter):
        print(f"{what} ...", file=sys.stderr, flush=True)
        show = False
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
    columns += [MofNCompleteColumn()] if total is not None else []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)
