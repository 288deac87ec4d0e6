"""A whole answer to look at: a page where each token of it can be asked, and a view in a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from gim.answers import alone
from gim.report import html, notebook, picture, terminal
from gim.report.facts import answer_facts
from gim.report.pieces import Piece, pieces
from gim.report.scale import LEVELS, Scale
from gim.report.text import number, one_line, shortened
from gim.targets import MEASURE_NAMES

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from gim.answers import AnswerAttribution

#: Tokens of an answer that a terminal has a line for.
_TERMINAL_ROWS = 40
#: Strongest tokens named for each token of an answer.
_NAMED = 4
#: Columns of a table of three that are its lines and the space beside them.
_BORDERS = 8
#: What stands before a sentence of an answer in it: sentences, and the tokens that the sentence begins with.
_EARLIER = "answer's earlier tokens"


@dataclass(frozen=True)
class Said:
    """What a page shows of an answer.

    Args:
        pieces: of the answer, as of a prompt.
        blocks: them as a page has them, line by line.
        lines: for each what it is made of, in words.
        facts: for each the facts of it that stand on top of a page.
        data: the numbers as JSON: of each token the scores of what stands before it, as they are shown, and where its
            colour is full.
        table: of the prompt's parts and the answer's sentences.
    """

    pieces: list[Piece]
    blocks: list[Markup]
    lines: list[str]
    facts: list[list[tuple[str, str]]]
    data: str
    table: Parts | None


@dataclass(frozen=True)
class Parts:
    """What each sentence of an answer owes to each named part of the prompt, and to the answer's earlier tokens.

    Args:
        names: of the parts, the answer's own last.
        measure: of which the scores are, in words.
        sentences: of the answer, as they are shown.
        scores: ``[sentences][names]``.
        largest: of their absolute values.
    """

    names: list[str]
    measure: str
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
        names = [*(span.name for span in table.prompt), *(_EARLIER for _ in table.answer)]
        largest = max((abs(score) for row in scores for score in row), default=0.0)
        measure = MEASURE_NAMES[answer.targets[0].measure]
        return cls(names, measure, [one_line(span.text) for span in table.rows], scores, largest)


def page(answer: AnswerAttribution, *, top: int = 20) -> str:
    """One page that needs nothing else, as :func:`gim.report.html.page`; a token of the answer can be clicked."""
    return html.page(answer.prompt, top=top, said=_said(answer))


def png(answer: AnswerAttribution, *, top: int = 15) -> bytes:
    """A picture, as :func:`gim.report.picture.png`, with the answer first and its table of parts."""
    return picture.png(answer.prompt, top=top, said=_said(answer))


def cell(answer: AnswerAttribution) -> str:
    """A piece of HTML for a notebook, as :func:`gim.report.notebook.cell`, with the answer first."""
    said, template = _said(answer), html.environment().get_template("answer.html.j2")
    macros: Any = template.module
    after = None if said.table is None else Markup(macros.parts(said.table))
    return notebook.cell(answer.prompt, before=Markup(macros.answer(said)), after=after)


def _said(answer: AnswerAttribution) -> Said:
    rows = [answer.row(place) for place in range(len(answer))]
    data: dict[str, Any] = {
        "prompt": len(answer.prompt),
        "levels": LEVELS,
        "rows": [{"limit": Scale.of(row).limit, "scores": _rounded(row.scores.tolist())} for row in rows],
    }
    shown = list(pieces(alone(answer)))
    return Said(
        pieces=shown,
        blocks=_blocks(shown),
        lines=[_line(answer, place) for place in range(len(answer))],
        facts=[answer_facts(row) for row in rows],
        data=json.dumps(data, separators=(",", ":"), allow_nan=False),
        table=Parts.of(answer),
    )


def _blocks(shown: Sequence[Piece]) -> list[Markup]:
    """An answer's text in blocks, as :func:`gim.report.html.lines`, whose tokens are buttons."""
    blocks: list[list[str]] = [[]]
    for piece in shown:
        text = html.with_line_ends(piece.text)
        button = f'<span id="a{piece.position}" role="button" tabindex="0" aria-pressed="false">{text}</span>'
        blocks[-1].append(text if piece.position is None else button)
        if piece.in_text and piece.text.endswith("\n"):
            blocks.append([])
    return [Markup("".join(block)) for block in blocks if block]


def _rounded(scores: list[float]) -> list[float]:
    """The digits that are shown: more would be rounded again."""
    return [float(f"{score:.3g}") for score in scores]


def _line(answer: AnswerAttribution, place: int) -> str:
    """One token of an answer: its number, how likely it was, and its strongest tokens."""
    target = answer.targets[place]
    words = f"{target.label}: {MEASURE_NAMES[target.measure]} {target.value:.4g}"
    probability = _probability(answer, place)
    if probability is not None:
        words += f", {100 * probability:.3g} %"
    return f"{words}. {_strongest(answer, place)}"


def _probability(answer: AnswerAttribution, place: int) -> float | None:
    """How likely the model held a token of an answer; None where its result does not tell."""
    own = answer.targets[place].token_ids[0]
    return next((one.probability for one in answer.next_tokens[place] if one.token_id == own), None)


def _strongest(answer: AnswerAttribution, place: int) -> str:
    return ", ".join(token + rest for token, rest in _placed(answer, place))


def _placed(answer: AnswerAttribution, place: int) -> list[tuple[str, str]]:
    """The strongest tokens of a row, with where each stands and its score: two may say the same."""
    first = len(answer.prompt)
    return [
        (
            one_line(repr(token.token)),
            f" at {token.position if token.position < first else f'answer {token.position - first}'} "
            f"{number(token.score)}",
        )
        for token in answer.row(place).top(_NAMED)
    ]


def _fitting(items: list[tuple[str, str]], room: int) -> str:
    """As many items as there is room for, each whole; of the first the token is cut where it does not fit."""
    shown = ""
    for token, rest in items:
        longer = f"{shown}, {token}{rest}" if shown else token + rest
        if cell_len(longer) > room:
            break
        shown = longer
    if not shown and items:
        token, rest = items[0]
        shown = shortened(token, max(1, room - cell_len(rest))) + rest
    return shown


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
            (one_line(token), f"{target.value:.4g}")
            for token, target in zip(tokens[:_TERMINAL_ROWS], answer.targets, strict=False)
        ]
        # A token of the answer is cut before a number is.
        taken = max(len(measure), *(len(value) for _, value in rows))
        most = max(8, (options.max_width - taken - _BORDERS) // 3)
        taken += min(most, max(len("token"), *(cell_len(token) for token, _ in rows)))
        for place, (token, value) in enumerate(rows):
            items = _fitting(_placed(answer, place), options.max_width - taken - _BORDERS)
            table.add_row(Text(shortened(token, most), style="bold"), value, Text(items))
        yield table
        if len(answer) > _TERMINAL_ROWS:
            yield Text(f"and {len(answer) - _TERMINAL_ROWS:,} more tokens", style="dim")
        yield Text()
        parts = Parts.of(answer)
        if parts is not None:
            yield Text(f"What each sentence of the answer owes to which part: {parts.measure}", style="bold")
            yield _parts(parts, options.max_width)
            yield Text()
        yield terminal.view(answer.prompt, top=self.top)


def _parts(parts: Parts, width: int) -> Table:
    """The parts' scores for each sentence of the answer; parts stand below one another, for their names may be long."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    scores = [[number(score) for score in row] for row in parts.scores]
    # A score is never cut, a part's name before a sentence is not, and a sentence has what is left.
    room = width - max(cell_len("score"), *(len(score) for row in scores for score in row)) - _BORDERS
    names = [shortened(one_line(name), room // 2) for name in parts.names]
    room -= max(map(cell_len, [*names, "part"]))
    for name in ("sentence", "part"):
        table.add_column(name, no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    for sentence, row, values in zip(parts.sentences, scores, parts.scores, strict=True):
        for place, (name, score, value) in enumerate(zip(names, row, values, strict=True)):
            table.add_row(
                Text(shortened(sentence, room) if place == 0 else ""),
                Text(name),
                Text(score, terminal.signed(value)),
                end_section=place == len(row) - 1,
            )
    return table


def view(answer: AnswerAttribution, *, top: int = 10) -> AnswerReport:
    """The answer's attribution for :meth:`rich.console.Console.print`."""
    return AnswerReport(answer, top)
