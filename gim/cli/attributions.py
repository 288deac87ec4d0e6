"""An attribution on the command line: progress while it runs, what is shown of it, and what writes its files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gim.answers import AnswerAttribution
    from gim.attribution import Attribution
    from gim.layerwise import LayerwiseAttribution

    #: What can be shown.
    Shown = Attribution | LayerwiseAttribution | AnswerAttribution


@contextmanager
def progress_bar(tokens: int) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each stage on standard error, with its tokens per second; nothing where that is not a terminal."""
    from rich.console import Console

    err = Console(stderr=True)
    if not err.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}
        started: dict[str, float] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
                started[stage] = time.perf_counter()
            seconds = time.perf_counter() - started[stage]
            rate = f"{tokens * done / total / seconds:,.0f} tokens/s" if done and total and seconds > 0 else ""
            bars.update(tasks[stage], completed=done, total=total, rate=rate)

        yield report


def show(attribution: Shown, top: int) -> None:
    from rich.console import Console

    from gim.answers import AnswerAttribution
    from gim.layerwise import LayerwiseAttribution
    from gim.report import answers, layerwise, terminal

    if isinstance(attribution, AnswerAttribution):
        Console().print(answers.view(attribution, top=top))
    elif isinstance(attribution, LayerwiseAttribution):
        Console().print(layerwise.view(attribution, top=top))
    else:
        Console().print(terminal.view(attribution, top=top))


def writers(attribution: Shown, top: int) -> dict[str, Callable[[Path], object]]:
    """What writes each file that can be asked for, by its option."""
    return {
        "--html": lambda path: attribution.to_html(path, top=max(top, 20)),
        "--json": attribution.to_json,
        "--png": lambda path: attribution.to_png(path, top=max(top, 15)),
    }
