"""Two results to look at: one page, and a table in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gim.report import html, terminal
from gim.report.facts import heading, uncovered
from gim.report.scale import LEVELS, Scale
from gim.report.text import number, one_line

if TYPE_CHECKING:
    from gim.comparison import Comparison


def said(comparison: Comparison) -> str:
    """How alike the two are, in words."""
    correlation = comparison.correlation
    both = sum(one.first is not None and one.second is not None for one in comparison.words)
    words = f"{both:,} {'word' if both == 1 else 'words'} in both"
    if correlation is None:
        return f"{words}."
    return f"{words}; correlation of their scores {correlation:.3f}."


def page(comparison: Comparison, *, top: int = 20) -> str:
    """One page that needs nothing else, as :func:`gim.report.html.page`."""
    style = html.style()
    sides = []
    for number_, one in enumerate((comparison.first, comparison.second)):
        scale = Scale.of(one)
        sides.append(
            {
                "label": heading(one),
                "model": one.model,
                "rules": one.rules.name,
                "limit": scale.limit,
                "lines": html.lines(one, scale, f"{'ab'[number_]}"),
                "warnings": uncovered(one),
            }
        )
    changes = comparison.changes(top)
    largest = max((abs(share) for one in changes for share in one.shares), default=0.0)
    return (
        html.environment()
        .get_template("comparison.html.j2")
        .render(
            style=Markup(style),
            style_hash=html.digest(style),
            sides=sides,
            differences=comparison.differences(),
            said=said(comparison),
            changes=[(one, [html.fraction(share, largest) for share in one.shares]) for one in changes],
            levels=LEVELS,
        )
    )


def view(comparison: Comparison, *, top: int = 10) -> RenderableType:
    """The differences, and the words whose share differs most, for :meth:`rich.console.Console.print`."""
    differences = Table(title="What differs", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("", "first", "second"):
        differences.add_column(name, style="dim" if not name else None, overflow="fold")
    for row in comparison.differences():
        differences.add_row(*(Text(one_line(cell)) for cell in row))
    table = Table(
        title="Words whose share of all scores differs most", title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("word", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ("first", "second", "change"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    for one in comparison.changes(top):
        cells = [
            Text("" if span is None else percent(share), terminal.signed(share))
            for span, share in zip((one.first, one.second), one.shares, strict=True)
        ]
        table.add_row(Text(one_line(one.text)), *cells, Text(percent(one.change), terminal.signed(one.change)))
    return Group(differences, Text(), Text(said(comparison)), Text(), table)


def percent(share: float) -> str:
    """A share with its sign, in per cent."""
    return f"{number(100 * share)} %"
