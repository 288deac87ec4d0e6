"""A whole answer to look at: a page where each token of it can be asked, and a view in a terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from gim.report import html, terminal
from gim.report.scale import LEVELS, Scale
from gim.report.text import number, one_line, visible
from gim.targets import MEASURE_NAMES

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from gim.answers import AnswerAttribution

#: Tokens of an answer that a terminal has a line for.
_TERMINAL_ROWS = 40
#: Strongest tokens named for each token of an answer.
_NAMED = 4


@dataclass(frozen=True)
class Said:
    """What a page shows of an answer.

    Args:
        tokens: of the answer, as they are shown.
        lines: for each what it is made of, in words.
        data: the numbers as JSON: of each token the scores of what stands before it and where its colour is full, and
            the same of the whole answer.
    """

    tokens: list[str]
    lines: list[str]
    data: str


def page(answer: AnswerAttribution, *, top: int = 20) -> str:
    """One page that needs nothing else, as :func:`gim.report.html.page`; a token of the answer can be clicked."""
    rows = [answer.row(place) for place in range(len(answer))]
    whole = Scale.of(answer.prompt)
    data: dict[str, Any] = {
        "prompt": len(answer.prompt),
        "levels": LEVELS,
        "whole": {"limit": whole.limit, "scores": _rounded(answer.prompt.scores.tolist())},
        "rows": [{"limit": Scale.of(row).limit, "scores": _rounded(row.scores.tolist())} for row in rows],
    }
    said = Said(
        tokens=[visible(token) for token in answer.tokens],
        lines=[_line(answer, place) for place in range(len(answer))],
        data=json.dumps(data, separators=(",", ":"), allow_nan=False),
    )
    return html.page(answer.prompt, top=top, said=said)


def _rounded(scores: list[float]) -> list[float]:
    """Four digits, which is more than a page shows."""
    return [float(f"{score:.4g}") for score in scores]


def _line(answer: AnswerAttribution, place: int) -> str:
    """One token of an answer: its number, how likely it was, and its strongest tokens."""
    target = answer.targets[place]
    words = f"{target.label}: {MEASURE_NAMES[target.measure]} {target.value:.4g}"
    likely = next((one for one in answer.next_tokens[place] if one.token_id == target.token_ids[0]), None)
    if likely is not None:
        words += f", {100 * likely.probability:.3g} %"
    return f"{words}. {_strongest(answer, place)}"


def _strongest(answer: AnswerAttribution, place: int) -> str:
    return ", ".join(f"{token.token!r} {number(token.score)}" for token in answer.row(place).top(_NAMED))


@dataclass(frozen=True)
class AnswerReport:
    """An answer's attribution that rich can draw: the answer, its tokens one by one, then the prompt."""

    answer: AnswerAttribution
    top: int = 10

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        answer = self.answer
        yield Text(one_line(answer.answer), style="bold")
        yield Text()
        table = Table(
            title="What each token was made of", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
            pad_edge=False,
        )  # fmt: skip
        table.add_column("token", no_wrap=True)
        measure = MEASURE_NAMES[answer.targets[0].measure]
        table.add_column(measure, justify="right", no_wrap=True)
        table.add_column("strongest before it", no_wrap=True)
        rows = [
            (one_line(answer.tokens[place]), f"{target.value:.4g}", one_line(_strongest(answer, place)))
            for place, target in enumerate(answer.targets[:_TERMINAL_ROWS])
        ]
        taken = max(cell_len(token) for token, *_ in rows) + max(len(measure), *(len(x) for _, x, _ in rows))
        for token, value, strongest in rows:
            room = max(12, options.max_width - taken - 8)
            shown = strongest if cell_len(strongest) <= room else set_cell_size(strongest, room - 1) + "\u2026"
            table.add_row(Text(token, style="bold"), value, Text(shown))
        yield table
        if len(answer) > _TERMINAL_ROWS:
            yield Text(f"and {len(answer) - _TERMINAL_ROWS:,} more tokens", style="dim")
        yield Text()
        yield terminal.view(answer.prompt, top=self.top)


def view(answer: AnswerAttribution, *, top: int = 10) -> AnswerReport:
    """The answer's attribution for :meth:`rich.console.Console.print`."""
    return AnswerReport(answer, top)
