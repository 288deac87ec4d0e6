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
def progress_bar(tokens: int, before: str = "") -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each stage on standard error, with its tokens per second; nothing where that is not a terminal.

    Args:
        tokens: of the prompt.
        before: what happens before the first stage, to be shown while it does.
    """
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
    bars = Progress(*columns, console=err, transient=True)
    waiting = err.status(before) if before else None
    tasks: dict[str, Any] = {}
    # When each stage was first heard of, and how much of it was done then: nobody knows how long that took.
    started: dict[str, tuple[float, int]] = {}

    def report(stage: str, done: int, total: int) -> None:
        if waiting is not None:
            waiting.stop()
        bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, rate="")
            started[stage] = time.perf_counter(), done
        since, first = started[stage]
        seconds = time.perf_counter() - since
        rate = f"{tokens * (done - first) / total / seconds:,.0f} tokens/s" if done > first and seconds > 0 else ""
        bars.update(tasks[stage], completed=done, total=total, rate=rate)

    try:
        if waiting is not None:
            waiting.start()
        yield report
    finally:
        if waiting is not None:
            waiting.stop()
        bars.stop()


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
