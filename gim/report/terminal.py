"""An attribution in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gim.report.facts import answer_facts, method_facts, uncovered
from gim.report.pieces import Piece, bins, context, excerpts, pieces
from gim.report.scale import LEVELS, LIGHT, Scale
from gim.report.text import fitting, number, one_line, shortened, visible
from gim.targets import MEASURE_NAMES

if TYPE_CHECKING:
    from gim.attribution import Attribution

MOST_TOKENS = 400
_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BLOCKS = " .:-=+*#@"


@dataclass(frozen=True)
class TerminalReport:
    """An attribution that rich can draw; without colour, signs in the text take the place of colours."""

    attribution: Attribution
    top: int = 10
    #: Whether it says what is explained; not where that stands above.
    explained: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        attribution = self.attribution
        scale = Scale.of(attribution)
        colour = console.color_system is not None and not console.no_color
        if self.explained:
            yield facts_grid(answer_facts(attribution))
            yield Text()
        yield self._table(scale, colour, options.max_width, options.ascii_only)
        yield Text()
        if attribution.segments:
            yield Text(f"Parts of the prompt: {MEASURE_NAMES[attribution.target.measure]}", style="bold")
            yield self._segments(scale, options.max_width)
            yield Text()
        if len(attribution) <= MOST_TOKENS:
            yield self._running(list(pieces(attribution)), scale, colour)
        else:
            yield from self._overview(scale, options.max_width, options.ascii_only)
            yield Text()
            yield Text("Strongest sentences, in the order of the text", style="bold")
            everything = list(pieces(attribution))
            for excerpt in excerpts(attribution, everything, 6, 60):
                position = next(piece.position for piece in excerpt if piece.position is not None)
                grid = Table.grid(padding=(0, 1))
                grid.add_column(justify="right", min_width=6, style="dim", no_wrap=True)
                grid.add_column()
                grid.add_row(f"{position:,}", self._running(excerpt, scale, colour, keep_lines=False))
                yield grid
        yield Text()
        yield self._legend(scale, colour)
        yield Text()
        yield self._card()

    def _segments(self, scale: Scale, width: int) -> Table:
        """What each named part of the text adds up to."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, style="dim")
        spans = self.attribution.to_segments()
        names = [fitting(one_line(span.name), width // 3) for span in spans]
        scores = [scale.aligned(span.score) for span in spans]
        room = width - max(map(cell_len, names)) - max(map(cell_len, scores)) - 3
        for name, score, span in zip(names, scores, spans, strict=True):
            style = signed(span.score)
            table.add_row(Text(name), Text(score, style=style), Text(shortened(one_line(span.text), room)))
        return table

    def _card(self) -> Panel:
        grid = facts_grid(method_facts(self.attribution))
        for warning in uncovered(self.attribution):
            grid.add_row(Text("Not covered", style="bold red"), Text(one_line(warning), style="red"))
        for note in self.attribution.report.notes:
            grid.add_row("Note", Text(one_line(note)))
        return Panel(grid, title="Attribution", title_align="left", border_style="dim", box=box.ROUNDED)

    def _running(self, part: Sequence[Piece], scale: Scale, colour: bool, *, keep_lines: bool = True) -> Text:
        """Text with a style for each token; without colour, strong tokens stand in [+ +] or [- -]."""
        scores, aside = self.attribution.scores.tolist(), self.attribution.aside
        running = Text(overflow="fold")
        for piece in part:
            if piece.position is None:
                shown, style = piece.text, ""
            else:
                is_aside = aside[piece.position]
                level = 0 if is_aside else scale.level(scores[piece.position])
                shown = piece.text
                style = "dim" if is_aside or not piece.in_text else _terminal_style(level)
                if not colour and abs(level) > LEVELS // 2:
                    shown = _bracketed(shown, "+" if level > 0 else "-")
            text = visible(shown).replace("\t", "    ")
            text = text.replace("\n", "\u21b5\n") if keep_lines else text.replace("\n", " ")
            running.append(text, style=style)
        return running

    def _overview(self, scale: Scale, width: int, ascii_only: bool) -> Iterator[Text]:
        """Two lines over the whole prompt: the largest score of each column above, the smallest below."""
        columns = bins(self.attribution, max(1, width - 2))
        blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
        yield Text(f"All {len(self.attribution):,} tokens, from the first to the last", style="bold")
        for sign, style in (("+", signed(1)), ("-", signed(-1))):
            sizes = (column.positive if sign == "+" else -column.negative for column in columns)
            bars = "".join(
                blocks[round((len(blocks) - 1) * size / scale.largest)] if scale.largest else " " for size in sizes
            )
            yield Text.assemble((f"{sign} ", "dim"), (bars, style), no_wrap=True)

    def _legend(self, scale: Scale, colour: bool) -> Text:
        legend = Text()
        if colour and scale.limit:
            for level in (-32, -20, -10, -3, 0, 3, 10, 20, 32):
                label = number(level / LEVELS * scale.limit)
                legend.append(f" {label} ", style=_terminal_style(level))
            legend.append("\n")
        elif scale.limit:
            legend.append(f"[+ +] more than half of +{scale.limit:.3g}, [- -] of -{scale.limit:.3g}. ")
        legend.append(scale.describe(), style="dim")
        return legend

    def _table(self, scale: Scale, colour: bool, width: int, ascii_only: bool) -> Table:
        table = Table(
            title="Strongest tokens",
            title_justify="left",
            title_style="bold",
            box=None if width < 60 else box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("score", justify="right", no_wrap=True)
        if width >= 60:
            table.add_column("", no_wrap=True)
        table.add_column("at", justify="right", no_wrap=True)
        table.add_column("in context", ratio=1, no_wrap=True, overflow="ellipsis")
        room = max(8, (width - 50) // 2)
        ranked = self.attribution.top(self.top)
        numbers = [
            max(map(cell_len, [head, *cells]))
            for head, cells in (
                ("#", [str(token.rank) for token in ranked]),
                ("score", [scale.aligned(token.score) for token in ranked]),
                ("at", [f"{token.position:,}" for token in ranked]),
            )
        ]
        # What surrounds a token is cut before a number is.
        left = width - sum(numbers) - (6 if width < 60 else 12 + 14)
        for token in ranked:
            found = context(self.attribution, token, room)
            style = signed(token.score)
            bar = ("#" if ascii_only else "\u2588") * round(
                12 * abs(token.score) / scale.largest if scale.largest else 0
            )
            cells: list[Text | str] = [str(token.rank), Text(scale.aligned(token.score), style=style)]
            if width >= 60:
                cells.append(Text(bar, style=style))
            word = found.token if colour else f"[{found.token}]"
            where = Text.assemble((found.before, "dim"), (word, f"bold {style}"), (found.after, "dim"))
            where.truncate(max(1, left), overflow="ellipsis")
            table.add_row(*cells, f"{token.position:,}", where)
        return table


def facts_grid(facts: Sequence[tuple[str, str]]) -> Table:
    """Facts below one another."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(one_line(value), style="bold" if name == "Target" else ""))
    return grid


def _terminal_style(level: int) -> str:
    """A style that is legible on dark and on light terminals: coloured text, then a filled background."""
    if abs(level) < LEVELS // 10:
        return ""
    if abs(level) < LEVELS // 2:
        return "#c76a10" if level > 0 else "#3f8fd2"
    filled = LIGHT.ramp(level > 0)[abs(level) - 1]
    return f"{LIGHT.text} on {filled}"


def signed(score: float) -> str:
    """The style of a number, by its sign."""
    return _terminal_style(LEVELS // 4 if score > 0 else -LEVELS // 4)


def _bracketed(text: str, sign: str) -> str:
    """The text with its visible part between signs."""
    core = text.strip()
    if not core:
        return text
    before, _, after = text.partition(core)
    return f"{before}[{sign}{core}{sign}]{after}"


def view(attribution: Attribution, *, top: int = 10) -> TerminalReport:
    """The attribution for :meth:`rich.console.Console.print`.

    Args:
        attribution: what to show; of a long prompt, an overview and the strongest sentences.
        top: rows of the table of the strongest tokens.

    Returns:
        An object that rich draws.
    """
    return TerminalReport(attribution, top)
