"""A bar of how far a command is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int, float | None], None] | None]:
    """A bar with the time left on standard error; nothing where that is not a terminal.

    Args:
        what: is counted, such as ``examples``.
    """
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=False), console=err, transient=True) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total, _: bars.update(bar, completed=done, total=total)
