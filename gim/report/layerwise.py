"""A model's layers or heads to look at: a map on the page of the prompt, in a notebook, a terminal and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from gim.report import html, picture, terminal
from gim.report.facts import answer_facts, method_facts, uncovered
from gim.report.html import level_class
from gim.report.notebook import cell as notebook_cell
from gim.report.scale import LEVELS, LIGHT, Scale
from gim.report.text import fitting, number, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

    from gim.layerwise import LayerwiseAttribution

#: Tokens that have a row on a page; a terminal has fewer.
MOST_ROWS, MOST_TERMINAL_ROWS = 40, 20
#: Of a map's colours. The last token alone has the largest scores of all in every later layer.
QUANTILE, LEAST = 0.9, 0.1
#: Columns between two numbers of a head of columns.
_NUMBERED = 5
_PICTURE_COLOURS = [*reversed(LIGHT.ramp(False)), LIGHT.page, *LIGHT.ramp(True)]


@dataclass(frozen=True)
class Map:
    """What is shown: rows of scores.

    Args:
        title, hint: in words.
        corner: what the rows are, over their names.
        rows: names.
        columns: names.
        scores: ``[rows][columns]``.
        places: each score's place in words, by row and column.
        aside: whether each row is set aside.
        scale: of the colours.
    """

    title: str
    hint: str
    corner: str
    rows: list[str]
    columns: list[str]
    scores: list[list[float]]
    places: list[list[str]]
    aside: list[bool]
    scale: Scale

    @classmethod
    def of(cls, found: LayerwiseAttribution, most: int) -> Map:
        """Tokens in the order of the text over layers, at most ``most`` of them; or layers over heads."""
        scores: list[list[float]] = found.scores.tolist()
        layers = [str(index) for index in range(len(found.layers))]
        shown = [row for row, aside in zip(found.scores.mT.tolist(), found.aside, strict=True) if not aside]
        scale = Scale.over((score for row in shown for score in row), QUANTILE, LEAST)
        if found.per == "head":
            heads = [str(index) for index in range(found.scores.shape[1])]
            places = [[f"layer {layer}, head {head}" for head in heads] for layer in layers]
            return cls(
                "Heads by layer",
                "Each head's output times its gradient, over all tokens. Rows are layers, columns heads.",
                *("layer \\ head", layers, heads, scores, places, [False] * len(layers), scale),
            )
        count = len(found.attribution)
        largest = found.scores.abs().amax(0).tolist() if layers else [0.0] * count
        best = sorted(range(count), key=lambda place: (found.aside[place], -largest[place]))
        # Rows that are set aside are blank: they come only where there are no words.
        best = [place for place in best if not found.aside[place]][:most] or best[:most]
        chosen = sorted(best)
        tokens = found.attribution.tokens
        words = sum(not aside for aside in found.aside)
        which = "Every token"
        if len(chosen) < words:
            which = f"The {len(chosen)} strongest of {count:,} tokens"
        elif len(chosen) < count:
            which = f"Every token but the {count - words:,} set aside"
        return cls(
            "Tokens by layer",
            f"The stream that each layer reads at a token's place, times its gradient. {which}, in their order.",
            "token \\ layer",
            [one_line(tokens[place]) for place in chosen],
            layers,
            [[row[place] for row in scores] for place in chosen],
            [[f"{one_line(tokens[place])}, layer {layer}" for layer in layers] for place in chosen],
            [found.aside[place] for place in chosen],
            scale,
        )

    def level(self, row: int, score: float) -> int:
        """The step of colour of a score; none of a row that is set aside."""
        return 0 if self.aside[row] else self.scale.level(score)

    def cells(self) -> list[tuple[str, bool, list[tuple[str, str]]]]:
        """Each row's name, whether it is set aside, and for each score its class and what it says."""
        return [
            (
                name,
                self.aside[row],
                [
                    (level_class(self.level(row, score)), f"{place}: {number(score)}")
                    for score, place in zip(self.scores[row], self.places[row], strict=True)
                ],
            )
            for row, name in enumerate(self.rows)
        ]

    def heads(self) -> list[str]:
        """The names of columns, as many as there is room for."""
        return [name if index % _NUMBERED == 0 else "" for index, name in enumerate(self.columns)]


def page(found: LayerwiseAttribution, *, top: int = 20) -> str:
    """The page of the tokens' own scores, as :func:`gim.report.html.page`, and the map."""
    return html.page(found.attribution, top=top, map_=Map.of(found, MOST_ROWS))


def cell(found: LayerwiseAttribution) -> str:
    """The map above the notebook cell of the tokens' own scores."""
    shown = html.environment().get_template("map.html.j2").module.map(Map.of(found, MOST_ROWS))  # type: ignore[attr-defined]
    return notebook_cell(found.attribution, before=Markup(shown))


@dataclass(frozen=True)
class LayerwiseReport:
    """Scores by layer or head that rich can draw: the map, then the prompt."""

    found: LayerwiseAttribution
    top: int = 10

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = Map.of(self.found, MOST_TERMINAL_ROWS)
        colour = console.color_system is not None and not console.no_color
        width = min(max(map(cell_len, [shown.corner, *shown.rows])), options.max_width // 3)
        room = options.max_width - width - 2
        each = 2 if 2 * len(shown.columns) <= room else 1
        columns = shown.columns[: room // each]
        yield terminal.facts_grid(answer_facts(self.found.attribution))
        yield Text()
        yield Text(shown.title, style="bold")
        yield Text(shown.hint, style="dim")
        if len(columns) < len(shown.columns):
            yield Text(f"Columns 0 to {len(columns) - 1} of {len(shown.columns)} fit here.", style="dim")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True, justify="right", width=width)
        grid.add_column(no_wrap=True)
        grid.add_row(Text(shown.corner, style="dim"), Text(_numbers(shown.heads()[: len(columns)], each), style="dim"))
        for row, name in enumerate(shown.rows):
            line = Text()
            for score in shown.scores[row][: len(columns)]:
                line.append(*_block(shown.level(row, score), each, colour))
            grid.add_row(Text(fitting(name, width), style="dim" if shown.aside[row] else ""), line)
        yield grid
        yield Text(_legend(shown.scale, colour), style="dim")
        yield Text()
        yield _strongest(self.found, self.top)
        yield Text()
        yield terminal.TerminalReport(self.found.attribution, self.top, explained=False)


def _numbers(names: Sequence[str], each: int) -> str:
    """Names over their columns, those that run into another left out."""
    line = ""
    for index, name in enumerate(names):
        if name and len(line) <= index * each:
            line = line.ljust(index * each) + name
    return line


def _block(level: int, each: int, colour: bool) -> tuple[str, str]:
    """The sign of a step of colour, and its style."""
    step = 0 if abs(level) < LEVELS // 10 else min(4, 1 + abs(level) * 4 // (LEVELS + 1))
    if colour:
        return ("·░▒▓█"[step] if step else "·") * each, terminal.signed(level) if step else "dim"
    return ("·+*#@" if level > 0 else "·-=%&")[step] * each, ""


def _legend(scale: Scale, colour: bool) -> str:
    signs = "░▒▓█ orange raises it, blue lowers it" if colour else "+ * # @ raise it, - = % & lower it"
    return f"{signs}; strongest from ±{scale.limit:.3g} on."


def _strongest(found: LayerwiseAttribution, top: int) -> Table:
    table = Table(title="Strongest scores", title_justify="left", title_style="bold", box=None, show_header=False)
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for one in found.top(top):
        table.add_row(str(one.rank), Text(number(one.score), terminal.signed(one.score)), one_line(found.name(one)))
    return table


def view(found: LayerwiseAttribution, *, top: int = 10) -> LayerwiseReport:
    """The scores for :meth:`rich.console.Console.print`."""
    return LayerwiseReport(found, top)


def png(found: LayerwiseAttribution, *, top: int = MOST_ROWS) -> bytes:
    """The map as a picture.

    Args:
        found: what to show.
        top: tokens that have a row, where that is more than on a page.

    Raises:
        ImportError: matplotlib is missing.
    """
    shown = Map.of(found, max(top, MOST_ROWS))
    attribution = found.attribution
    facts = [f"{name}: {one_line(value)}" for name, value in answer_facts(attribution)]
    facts += [f"{name}: {one_line(value)}" for name, value in method_facts(attribution)[:5]]
    facts += [f"Not covered: {one_line(warning)}" for warning in uncovered(attribution)]
    above, below = 0.16 * len(facts) + 0.55, 0.75
    height = max(0.16 * len(shown.rows), 0.6)
    total = above + height + below

    def draw(figure: Figure, monospace: list[str]) -> None:
        from matplotlib.colors import ListedColormap

        picture.draw_facts(figure.add_axes((0.06, 1 - (above - 0.35) / total, 0.91, (above - 0.45) / total)), facts)
        axes = figure.add_axes((0.2, below / total, 0.77, height / total))
        levels = [[shown.level(row, score) for score in scores] for row, scores in enumerate(shown.scores)]
        axes.imshow(
            levels, cmap=ListedColormap(_PICTURE_COLOURS), vmin=-LEVELS - 0.5, vmax=LEVELS + 0.5, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(shown.title, loc="left", fontsize=8, fontweight="bold")
        axes.set_yticks(range(len(shown.rows)), [fitting(name, 22) for name in shown.rows], family=monospace)
        named = [(index, name) for index, name in enumerate(shown.heads()) if name]
        axes.set_xticks([index for index, _ in named], [name for _, name in named])
        axes.set_xlabel("layer" if found.per == "layer" else "head", fontsize=7, color=picture.PICTURE_SOFT)
        axes.tick_params(length=2, labelsize=7, colors=picture.PICTURE_SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        figure.text(0.06, 0.12 / total, shown.scale.describe(), fontsize=6.5, color=picture.PICTURE_SOFT)

    return picture.drawn(total, draw)
