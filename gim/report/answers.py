"""A whole answer to look at: a page where each token of it can be asked, and a view in a terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from gim.answers import alone
from gim.report import html, terminal
from gim.report.pieces import Piece, pieces
from gim.report.scale import LEVELS, Scale
from gim.report.text import number, one_line
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
        pieces: of the answer, as of a prompt.
        lines: for each what it is made of, in words.
        data: the numbers as JSON: of each token the scores of what stands before it and where its colour is full, and
            the same of the whole answer.
        table: of the prompt's parts and the answer's sentences.
    """

    pieces: list[Piece]
    lines: list[str]
    data: str
    table: Parts | None


@dataclass(frozen=True)
class Parts:
    """What each sentence of an answer owes to each named part of the prompt, and to the answer before it.

    Args:
        names: of the parts, the answer's own last.
        sentences: of the answer, as they are shown.
        scores: ``[sentences][names]``.
        largest: of their absolute values.
    """

    names: list[str]
    sentences: list[str]
    scores: list[list[float]]
    largest: float

    @classmethod
    def of(cls, answer: AnswerAttribution) -> Parts | None:
        """None where the prompt has no parts with names."""
        if not answer.prompt.segments:
            return None
        table = answer.to_table("sentence", "segment")
        scores: list[list[float]] = table.scores.tolist()
        names = [*(span.name for span in table.prompt), *("the answer before it" for _ in table.answer)]
        largest = max((abs(score) for row in scores for score in row), default=0.0)
        return cls(names, [one_line(span.text) for span in table.rows], scores, largest)


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
        pieces=list(pieces(alone(answer))),
        lines=[_line(answer, place) for place in range(len(answer))],
        data=json.dumps(data, separators=(",", ":"), allow_nan=False),
        table=Parts.of(answer),
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
        tokens = [piece.text for piece in pieces(alone(answer)) if piece.position is not None]
        rows = [
            (one_line(token), f"{target.value:.4g}", one_line(_strongest(answer, place)))
            for place, (token, target) in enumerate(zip(tokens[:_TERMINAL_ROWS], answer.targets, strict=False))
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
        parts = Parts.of(answer)
        if parts is not None:
            yield _parts(parts, options.max_width)
            yield Text()
        yield terminal.view(answer.prompt, top=self.top)


def _parts(parts: Parts, width: int) -> Table:
    """The parts' scores for each sentence of the answer; parts stand below one another, for their names may be long."""
    table = Table(
        title="What each sentence of the answer owes to which part", title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("sentence", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("part", ratio=1, no_wrap=True, overflow="ellipsis", max_width=width // 3)
    widest = max(len(number(score)) for row in parts.scores for score in row)
    table.add_column("score", justify="right", no_wrap=True, min_width=max(5, widest))
    for sentence, scores in zip(parts.sentences, parts.scores, strict=True):
        for place, (name, score) in enumerate(zip(parts.names, scores, strict=True)):
            last = place == len(scores) - 1
            table.add_row(
                Text(sentence if place == 0 else ""),
                Text(one_line(name)),
                Text(number(score), terminal.signed(score)),
                end_section=last,
            )
    return table


def view(answer: AnswerAttribution, *, top: int = 10) -> AnswerReport:
    """The answer's attribution for :meth:`rich.console.Console.print`."""
    return AnswerReport(answer, top)
