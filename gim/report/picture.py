"""An attribution as a picture; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gim.report.facts import answer_facts, method_facts, uncovered
from gim.report.pieces import Piece, bins, context, excerpts, pieces
from gim.report.scale import LEVELS, LIGHT, Scale
from gim.report.text import number, one_line, shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gim.attribution import Attribution, RankedToken
    from gim.report.answers import Parts, Said

# Prompts of at most this many characters are drawn whole; of longer ones the strongest sentences.
_PICTURE_CHARACTERS = 2000
_PICTURE_COLUMNS = 110
_PICTURE_WIDTH = 9.0
_PICTURE_DPI = 160
# What covers scripts that matplotlib's own fonts lack; those that are not installed are left out.
_PICTURE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans Hebrew",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Symbols 2",
    "Noto Emoji",
    "Hiragino Sans",
    "Yu Gothic",
    "Arial Unicode MS",
)
PICTURE_INK = LIGHT.text
PICTURE_SOFT = "#5b606b"
#: Behind tokens that are set aside, as on a page.
_PICTURE_ASIDE = "#ececea"
_PICTURE_POSITIVE = "#d9711c"
_PICTURE_NEGATIVE = "#3383c4"


@dataclass(frozen=True)
class _Cell:
    """A part of one row of monospaced text: its first column, its width in columns, and its step of colour; None of
    what is set aside."""

    column: int
    width: int
    text: str
    level: int | None


def png(attribution: Attribution, *, top: int = 15, said: Said | None = None) -> bytes:
    """A picture: what is explained, the text or its strongest sentences, scores along the prompt, the strongest tokens,
    and facts.

    Args:
        attribution: what to show.
        top: bars of the strongest tokens.
        said: the answer that the attribution is of, to stand first.

    Returns:
        The content of a PNG file.

    Raises:
        ImportError: matplotlib is missing.
    """
    scale = Scale.of(attribution)
    ranked = attribution.top(top)
    named = [*answer_facts(attribution), *method_facts(attribution)[:5]]
    first, *facts = [f"{name}: {one_line(value)}" for name, value in named]
    facts += [f"Not covered: {one_line(warning)}" for warning in uncovered(attribution)]
    facts += [f"Note: {one_line(note)}" for note in attribution.report.notes]
    rows = _picture_rows(attribution, scale)
    is_whole = len(attribution.text) <= _PICTURE_CHARACTERS
    text = "The prompt" if is_whole else "Strongest sentences of the prompt, in the order of the text"
    # The height of each part in inches, the gap above it, and what draws it; a row of text has a fifth of one.
    shown: list[tuple[float, float, Callable[[Axes, list[str]], None]]] = [
        (0.2, 0.26, lambda axes, _: draw_facts(axes, [first]))
    ]
    if said is not None:
        answer = _wrapped([said.pieces], lambda _: 0)
        shown.append((0.3, _rows_height(answer), lambda axes, fonts: _draw_rows(axes, answer, "The answer", fonts)))
    shown.append((0.4, _rows_height(rows), lambda axes, fonts: _draw_rows(axes, rows, text, fonts)))
    if said is not None and said.table is not None:
        table = _table_rows(said.table)
        title = f"What each sentence of the answer owes to which part: {said.table.measure}"
        shown.append((0.4, _rows_height(table), lambda axes, fonts: _draw_rows(axes, table, title, fonts)))
    height = 0.19 * max(1, len(ranked)) + 0.1
    shown += [
        (0.4, 1.25, lambda axes, _: _draw_along(axes, attribution, scale)),
        (0.5, height, lambda axes, fonts: _draw_top(axes, attribution, ranked, fonts)),
        (0.3, 0.16 * len(facts) + 0.1, lambda axes, _: draw_facts(axes, facts, bold=0)),
    ]
    total = sum(gap + size for gap, size, _ in shown) + 0.35

    def draw(figure: Figure, monospace: list[str]) -> None:
        upper = total
        for gap, size, draw_part in shown:
            upper -= gap + size
            draw_part(figure.add_axes((0.06, upper / total, 0.91, size / total)), monospace)
        words = scale.describe() + (" Grey tokens are set aside." if any(attribution.aside) else "")
        figure.text(0.06, 0.12 / total, words, fontsize=6.5, color=PICTURE_SOFT)

    return drawn(total, draw)


def _rows_height(rows: Sequence[object]) -> float:
    return 0.2 * max(1, len(rows)) + 0.1


def drawn(height: float, draw: Callable[[Figure, list[str]], None]) -> bytes:
    """The content of a PNG file.

    Args:
        height: of the figure in inches.
        draw: draws on a figure, and is given the names of monospaced fonts.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install gim-kernels[report]") from error

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fallbacks = [name for name in _PICTURE_FONTS if name in installed]
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The user's own settings are neither used nor changed. A glyph that no font has becomes a box, which
        # is all that the warning says.
        matplotlib.rcdefaults()
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        warnings.filterwarnings("ignore", message=".*missing from font")
        matplotlib.rcParams.update(
            {
                "font.family": ["DejaVu Sans", *fallbacks],
                "font.size": 8.0,
                "text.hinting": "none",
                "axes.linewidth": 0.6,
                "text.parse_math": False,
            }
        )
        figure = Figure(figsize=(_PICTURE_WIDTH, height), facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure, ["DejaVu Sans Mono", *fallbacks])
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=_PICTURE_DPI, metadata={"Software": "gim-kernels"})
    return content.getvalue()


def _picture_rows(attribution: Attribution, scale: Scale) -> list[list[_Cell]]:
    """The text, or its strongest sentences, wrapped to rows of equal width."""
    everything = list(pieces(attribution))
    is_whole = len(attribution.text) <= _PICTURE_CHARACTERS
    parts = [everything] if is_whole else excerpts(attribution, everything, 6, 60)
    scores, aside = attribution.scores.tolist(), attribution.aside
    return _wrapped(parts, lambda position: None if aside[position] else scale.level(scores[position]))


def _wrapped(parts: Sequence[Sequence[Piece]], level_of: Callable[[int], int | None]) -> list[list[_Cell]]:
    """Parts of a text in rows of equal width, an empty one between two.

    Args:
        parts: what they consist of.
        level_of: a token's step of colour; None for one that is set aside.
    """
    rows: list[list[_Cell]] = []
    for part in parts:
        row: list[_Cell] = []
        column = 0
        for piece in part:
            level = 0 if piece.position is None else level_of(piece.position)
            for character in re.split("(\n)", visible(piece.text).replace("\t", "    ")):
                if character == "\n":
                    rows.append([*row, _Cell(column, 1, "\u21b5", level)])
                    row, column = [], 0
                    continue
                for chunk, width in _chunks(character, _PICTURE_COLUMNS - column):
                    if column + width > _PICTURE_COLUMNS and column:
                        rows.append(row)
                        row, column = [], 0
                    row.append(_Cell(column, width, chunk, level))
                    column += width
        if row:
            rows.append(row)
        if part is not parts[-1]:
            rows.append([])
    return rows


def _table_rows(parts: Parts) -> list[list[_Cell]]:
    """A row for each sentence of an answer, and one below it for each part of the prompt."""
    rows: list[list[_Cell]] = []
    for sentence, scores in zip(parts.sentences, parts.scores, strict=True):
        rows.append([_Cell(0, _PICTURE_COLUMNS, shortened(sentence, _PICTURE_COLUMNS), 0)])
        for name, score in zip(parts.names, scores, strict=True):
            level = round(LEVELS * score / parts.largest) if parts.largest else 0
            shown = number(score).rjust(9)
            rows.append([_Cell(4, 9, shown, level), _Cell(15, 90, shortened(one_line(name), 90), 0)])
    return rows


def _chunks(text: str, room: int) -> Iterator[tuple[str, int]]:
    """The text in parts that fit a row, each with its width in columns; whole where it fits the next row."""
    widths = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    if sum(widths) <= max(room, _PICTURE_COLUMNS // 2):
        if text:
            yield text, sum(widths)
        return
    start = used = 0
    for index, width in enumerate(widths):
        if used + width > room:
            yield text[start:index], used
            start, used, room = index, 0, _PICTURE_COLUMNS
        used += width
    yield text[start:], used


def draw_facts(axes: Axes, facts: Sequence[str], *, bold: int = 1) -> None:
    """Facts below one another, the first of them large and bold."""
    axes.set_axis_off()
    for index, fact in enumerate(facts):
        axes.text(
            0,
            1 - (index + 0.5) / len(facts),
            fact if len(fact) < 150 else fact[:149] + "\u2026",
            transform=axes.transAxes,
            va="center",
            fontsize=9 if index < bold else 7.5,
            fontweight="bold" if index < bold else "normal",
            color=PICTURE_INK if index < bold else PICTURE_SOFT,
        )


def _draw_along(axes: Axes, attribution: Attribution, scale: Scale) -> None:
    columns = bins(attribution, 800)
    places = [(index + 0.5) * len(attribution) / len(columns) for index in range(len(columns))]
    width = max(len(attribution) / max(1, len(columns)), len(attribution) / 500)
    axes.bar(places, [column.positive for column in columns], width, color=_PICTURE_POSITIVE)
    axes.bar(places, [column.negative for column in columns], width, color=_PICTURE_NEGATIVE)
    axes.axhline(0, color=PICTURE_INK, linewidth=0.6)
    axes.set_xlim(0, max(1, len(attribution)))
    end = scale.largest * 1.08 or 1.0
    axes.set_ylim(-end, end)
    axes.set_title("Scores along the prompt, by token", loc="left", fontsize=8, fontweight="bold")
    axes.tick_params(length=2, labelsize=7, colors=PICTURE_SOFT)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_top(axes: Axes, attribution: Attribution, ranked: Sequence[RankedToken], monospace: list[str]) -> None:
    axes.set_title("Strongest tokens, in context", loc="left", fontsize=8, fontweight="bold")
    axes.set_axis_off()
    axes.set_ylim(max(1, len(ranked)) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    largest = max((abs(token.score) for token in ranked), default=1.0) or 1.0
    for row, token in enumerate(ranked):
        found = context(attribution, token, 26)
        colour = _PICTURE_POSITIVE if token.score > 0 else _PICTURE_NEGATIVE
        style: dict[str, Any] = {"va": "center", "fontsize": 7.5, "family": monospace}
        axes.text(0.045, row, f"{token.position}", ha="right", color=PICTURE_SOFT, **style)
        axes.text(0.31, row, found.before, ha="right", color=PICTURE_SOFT, **style)
        word = axes.text(0.31, row, found.token, ha="left", color=PICTURE_INK, fontweight="bold", **style)
        axes.annotate(found.after, xy=(1, 0.5), xycoords=word, ha="left", color=PICTURE_SOFT, **style)
        axes.barh(row, 0.3 * abs(token.score) / largest, left=0.62, height=0.7, color=colour)
        axes.text(0.63 + 0.3 * abs(token.score) / largest, row, number(token.score), va="center", fontsize=7.5)


def _draw_rows(axes: Axes, rows: Sequence[Sequence[_Cell]], title: str, monospace: list[str]) -> None:
    from matplotlib.patches import Rectangle

    axes.set_title(title, loc="left", fontsize=8, fontweight="bold")
    axes.set_axis_off()
    axes.set_xlim(0, _PICTURE_COLUMNS)
    axes.set_ylim(max(1, len(rows)), 0)
    ramps = {True: LIGHT.ramp(True), False: LIGHT.ramp(False)}
    # A character of the font is 0.602 of its size wide, and a column is this many points.
    size = _PICTURE_WIDTH * axes.get_position().width * 72 / _PICTURE_COLUMNS / 0.602
    for index, row in enumerate(rows):
        for cell in row:
            if cell.level != 0:
                colour = _PICTURE_ASIDE if cell.level is None else ramps[cell.level > 0][abs(cell.level) - 1]
                axes.add_patch(Rectangle((cell.column, index + 0.05), cell.width, 0.9, facecolor=colour, linewidth=0))
            axes.text(
                cell.column,
                index + 0.52,
                cell.text,
                va="center",
                family=monospace,
                fontsize=size,
                color=PICTURE_SOFT if cell.level is None else PICTURE_INK,
            )
