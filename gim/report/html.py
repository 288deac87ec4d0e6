"""An attribution as one self-contained page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from jinja2 import BaseLoader, Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from gim.report.facts import answer_facts, heading, method_facts, uncovered
from gim.report.pieces import bins, context, pieces, strongest_sentences
from gim.report.scale import DARK, LEVELS, LIGHT, Scale
from gim.report.text import number, one_line, visible
from gim.targets import MEASURE_NAMES

if TYPE_CHECKING:
    from gim.attribution import Attribution
    from gim.report.answers import Said
    from gim.report.layerwise import Map

# Columns of the overview strip of a page; more than a screen shows would only make the file larger.
_STRIP_COLUMNS = 600
# Prompts of fewer tokens fit on a screen and need no overview.
_STRIP_FROM = 150


@cache
def environment() -> Environment:
    loader: BaseLoader = FunctionLoader(template)
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters["one_line"] = one_line
    made.filters["number"] = number
    return made


def template(name: str) -> str:
    return resources.files("gim").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def page(attribution: Attribution, *, top: int = 20, said: Said | None = None, map_: Map | None = None) -> str:
    """One page that needs nothing else: no network, no font, no script from elsewhere.
    Args:
        attribution: what to show.
        top: rows of the table of the strongest tokens.
        said: the answer that the attribution is of, whose tokens can then be asked one by one.
        map_: scores of the model's layers, to stand above the prompt.
    Returns:
        The page, which can be encoded as UTF-8.
    """
    scale = Scale.of(attribution)
    ranked = attribution.top(top)
    sentences = strongest_sentences(attribution, 10)
    largest_sentence = max((abs(span.score) for _, span in sentences), default=0.0)
    segments = attribution.to_segments()
    largest_segment = max((abs(span.score) for span in segments), default=0.0)
    sheet = style()
    script = template("report.js")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            style=Markup(sheet),
            script=Markup(script),
            style_hash=digest(sheet),
            script_hash=digest(script),
            answer=answer_facts(attribution),
            facts=method_facts(attribution),
            segments=[(span, fraction(span.score, largest_segment)) for span in segments],
            warnings=uncovered(attribution),
            notes=attribution.report.notes,
            label=heading(attribution),
            measure=MEASURE_NAMES[attribution.target.measure],
            scale=scale,
            aligned=scale.aligned,
            levels=LEVELS,
            ranked=[(token, context(attribution, token, 20), fraction(token.score, scale.largest)) for token in ranked],
            sentences=[(rank, span, fraction(span.score, largest_sentence)) for rank, span in sentences],
            strip=_strip(attribution, scale) if len(attribution) >= _STRIP_FROM else None,
            lines=lines(attribution, scale),
            count=len(attribution),
            said=said,
            map_=map_,
        )
    )


def fraction(score: float, largest: float) -> float:
    """A score as a percentage of the largest, for the length of a bar."""
    return round(100 * score / largest, 2) if largest else 0.0


def digest(content: str) -> str:
    """The name by which a content security policy allows one inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


@cache
def style() -> str:
    """The style sheet of a page, with the steps of colour of both themes."""
    variables = {
        name: "".join(
            f"--{side}{level}:{colour};"
            for side, positive in (("p", True), ("n", False))
            for level, colour in enumerate(theme.ramp(positive), start=1)
        )
        for name, theme in (("light", LIGHT), ("dark", DARK))
    }
    classes = "".join(
        f".{side}{level}{{background:var(--{side}{level})}}" for side in "pn" for level in range(1, LEVELS + 1)
    )
    return (
        environment()
        .get_template("report.css.j2")
        .render(light=LIGHT, dark=DARK, variables=variables, classes=classes, strongest=LEVELS)
    )


def lines(attribution: Attribution, scale: Scale, prefix: str = "t") -> list[Markup]:
    """The running text in blocks, which end where a token ends a line, so that a browser lays out each alone.

    Each token has an id: the prefix and its position.
    """
    scores, aside = attribution.scores.tolist(), attribution.aside
    blocks: list[Markup] = []
    parts: list[str] = []
    for piece in pieces(attribution):
        shown = with_line_ends(piece.text)
        if piece.position is None:
            parts.append(shown)
        else:
            score = scores[piece.position]
            is_aside = aside[piece.position]
            name = "s" if is_aside else level_class(scale.level(score))
            if not piece.in_text and not is_aside:
                name = f"{name} e".strip()
            parts.append(
                f"<span id={prefix}{piece.position}{attribute('class', name)} data-s={number(score)}>{shown}</span>"
            )
        if piece.in_text and piece.text.endswith("\n"):
            blocks.append(Markup("".join(parts)))
            parts = []
    if parts:
        blocks.append(Markup("".join(parts)))
    return blocks


def attribute(name: str, value: str) -> str:
    """An attribute of a tag; nothing where it would be empty. The values here are ours, never the prompt's."""
    return f' {name}="{value}"' if " " in value else f" {name}={value}" if value else ""


def level_class(level: int) -> str:
    return f"p{level}" if level > 0 else f"n{-level}" if level < 0 else ""


def with_line_ends(text: str) -> str:
    """Escaped text; before each line feed an element that a style sheet shows as a sign and nobody copies."""
    return str(escape(visible(text))).replace("\n", "<b></b>\n")


@dataclass(frozen=True)
class _Strip:
    """The overview of a page: four outlines in a box of `width` by 100, and the ends of both scales."""

    width: int
    tokens_positive: str
    tokens_negative: str
    sentences_positive: str
    sentences_negative: str
    largest_token: float
    largest_sentence: float


def _strip(attribution: Attribution, scale: Scale) -> _Strip:
    columns = bins(attribution, _STRIP_COLUMNS)
    sentences = attribution.to_sentences()
    largest = max((abs(span.score) for span in sentences), default=0.0)
    width = 1000
    column_width = width / len(columns)
    per_token = width / len(attribution)

    def outline(bars: Iterator[tuple[float, float, float]], end: float) -> str:
        """A path of bars from (left, width, score), upwards from the middle for scores above 0."""
        return "".join(
            f"M{left:.1f} 50h{bar:.1f}v{-50 * score / end:.1f}h{-bar:.1f}z"
            for left, bar, score in bars
            if end and round(50 * abs(score) / end, 1)
        )

    def of_tokens(positive: bool) -> Iterator[tuple[float, float, float]]:
        for index, column in enumerate(columns):
            yield index * column_width, column_width, column.positive if positive else column.negative

    def of_sentences(positive: bool) -> Iterator[tuple[float, float, float]]:
        for span in sentences:
            first, last = span.tokens
            if (span.score > 0) == positive:
                yield first * per_token, (last - first) * per_token, span.score

    return _Strip(
        width,
        outline(of_tokens(True), scale.largest),
        outline(of_tokens(False), scale.largest),
        outline(of_sentences(True), largest),
        outline(of_sentences(False), largest),
        scale.largest,
        largest,
    )
