"""Attributions to look at: a page of HTML, a piece of a notebook, a terminal, a picture.

Nothing here is imported before something is drawn, and matplotlib not before a picture is.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from jinja2 import BaseLoader, Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gim.targets import MEASURE_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gim.answer_views import Said
    from gim.attribution import Attribution, RankedToken, Span

# ------------------------------------------------------------------------------------------------------ colour

#: Steps of colour on each side of 0.
LEVELS = 32
#: Colours saturate at this quantile of |score| over the tokens that are not set aside ...
SATURATION_QUANTILE = 0.99
#: ... or at this part of the largest |score|, if that is more: where a few tokens of a long prompt have nearly
#: all of the score, the quantile alone would paint the noise of all others in full colour.
SATURATION_LEAST = 0.2


@dataclass(frozen=True)
class Theme:
    """The colours of one theme; text has a contrast of at least 4.5 to 1 on each step of both sides.

    Args:
        page: background of a token whose score is 0.
        text: text of every token.
        positive: background of a token at or beyond the positive end of the scale.
        negative: background of a token at or beyond the negative end.
    """

    page: str
    text: str
    positive: str
    negative: str

    def ramp(self, positive: bool) -> list[str]:
        """The backgrounds of the levels 1 to :data:`LEVELS` of one side."""
        end = self.positive if positive else self.negative
        return [_mix(self.page, end, level / LEVELS) for level in range(1, LEVELS + 1)]


# Orange and blue differ for every common colour vision deficiency; orange is positive, as warm colours are in
# most attribution pictures.
LIGHT = Theme(page="#ffffff", text="#15171c", positive="#f0852d", negative="#5aa5e0")
DARK = Theme(page="#15171b", text="#f1f2f4", positive="#b05206", negative="#226eb2")


def _mix(start: str, end: str, amount: float) -> str:
    """The colour between two others, in OKLab, where equal steps look equal (Ottosson 2020)."""
    mixed = [a + (b - a) * amount for a, b in zip(_to_oklab(start), _to_oklab(end), strict=True)]
    return _from_oklab(mixed)


def _to_oklab(colour: str) -> list[float]:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = ((c / 12.92) if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def _from_oklab(lab: Sequence[float]) -> str:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    channels = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in linear)
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, c))):02x}" for c in channels)


@dataclass(frozen=True)
class Scale:
    """From a score to a step of colour, linear around 0 and saturating at `limit` on both sides.

    Special tokens are not on the scale, because a begin-of-text token often has many times the score of all
    others.

    Args:
        limit: the |score| from which on the colour is full; 0 where every score is 0.
        largest: the largest |score|.
        beyond: how many tokens lie beyond the limit.
    """

    limit: float
    largest: float
    beyond: int

    @classmethod
    def of(cls, attribution: Attribution) -> Scale:
        """The scale of an attribution: see :data:`SATURATION_QUANTILE` and :data:`SATURATION_LEAST`."""
        scores: list[float] = attribution.scores.tolist()
        ordered = sorted(abs(s) for s, special in zip(scores, attribution.aside, strict=True) if not special)
        if not ordered:
            return cls(0.0, 0.0, 0)
        largest = ordered[-1]
        quantile = ordered[ceil(SATURATION_QUANTILE * (len(ordered) - 1))]
        limit = max(quantile, SATURATION_LEAST * largest)
        return cls(limit, largest, sum(size > limit for size in ordered))

    def level(self, score: float) -> int:
        """The step of colour, from -LEVELS to LEVELS; 0 is no colour."""
        if self.limit == 0:
            return 0
        return max(-LEVELS, min(LEVELS, round(LEVELS * max(-1.0, min(1.0, score / self.limit)))))

    def aligned(self, score: float) -> str:
        """A score with as many decimals as all others of a table, four digits of the largest."""
        if self.largest == 0:
            return "0"
        decimals = max(0, 3 - floor(log10(self.largest)))
        return f"{score:+.{decimals}f}" if decimals <= 7 else f"{score:+.2e}"

    def describe(self) -> str:
        """The rule of the scale in words, for a legend."""
        if self.limit == 0:
            return "Every score is 0."
        beyond = f" {self.beyond} tokens lie beyond." if self.beyond > 1 else ""
        return (
            f"Linear around 0; full colour from ±{self.limit:.3g} on: the {100 * SATURATION_QUANTILE:.0f}th "
            f"percentile of |score| without tokens set aside, at least {100 * SATURATION_LEAST:.0f} % of the "
            f"largest, {self.largest:.3g}.{beyond}"
        )


# -------------------------------------------------------------------------------------------------------- text

# Format characters that are seen or that join visible ones; all others are shown by their code.
_HARMLESS_FORMAT = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2\U000110bd\U000110cd")
_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u08e2\u180e\u200b-\u200f\u2028-\u202f"
    "\u2060-\u206f\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff0-\uffff\U00010000-\U0010ffff]"
)


def visible(text: str) -> str:
    """A text in which no character is invisible, changes the direction of others or controls a terminal.

    Control characters become their pictures, and format characters, lone surrogates and noncharacters their
    code. Line feeds and tabs stay.
    """
    return _SUSPECT.sub(lambda match: _visible(match[0]), text)


def _visible(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code & 0xFFFE == 0xFFFE:
        return f"\u27e8U+{code:04X}\u27e9"
    category = unicodedata.category(character)
    if category in ("Cc", "Cs", "Zl", "Zp", "Cn", "Co") or (category == "Cf" and character not in _HARMLESS_FORMAT):
        # An unassigned character may be one that this Python does not know yet, so it stays as it is.
        if category in ("Cn", "Co") and not 0xFDD0 <= code <= 0xFDEF:
            return character
        return f"\u27e8U+{code:04X}\u27e9"
    return character


def one_line(text: str) -> str:
    """A visible text in which line feeds and tabs are visible too."""
    return visible(text).replace("\n", "\u21b5").replace("\t", "\u21e5")


def number(score: float) -> str:
    """A score with its sign, to three digits."""
    return "0" if score == 0 else f"{score:+.3g}"


@dataclass(frozen=True)
class Piece:
    """A part of the running text.

    Args:
        text: what to show.
        position: the token it belongs to; ``None`` for characters that belong to no token.
        in_text: whether these are characters of the text; the pieces for which this holds are the text.
    """

    text: str
    position: int | None
    in_text: bool


def pieces(attribution: Attribution) -> Iterator[Piece]:
    """The text cut into what belongs to each token, in order; every token has exactly one piece.

    White space that a tokenizer leaves out of the offsets belongs to the token after it. A token that adds no
    character (a special one, or a further part of a character that the token before it began) has a piece
    that is not of the text.
    """
    shown = 0
    for position, (start, end) in enumerate(attribution.offsets):
        between = attribution.text[shown:start] if end > start else ""
        if between and not between.isspace():
            yield Piece(between, None, True)
            shown = start
        if end > shown and end > start:
            yield Piece(attribution.text[shown:end], position, True)
            shown = end
        elif attribution.special[position]:
            yield Piece(attribution.tokens[position], position, False)
        else:
            # What a tokenizer adds (a space in front of the text) and parts of a character have no glyph.
            yield Piece("\u00b7", position, False)
    if shown < len(attribution.text):
        yield Piece(attribution.text[shown:], None, True)


@dataclass(frozen=True)
class Context:
    """A token in one line with a little text on both sides."""

    before: str
    token: str
    after: str


def context(attribution: Attribution, token: RankedToken, width: int) -> Context:
    """A token with what fits of the text before and after it, `width` columns on each side."""
    text = attribution.text
    # White space at the start of a token is not what anyone looks for.
    start = token.end - len(text[token.start : token.end].lstrip())
    if start == token.end:
        start = token.start
    # Twice the width in characters, since some, such as marks, take no room; then cut to what fits.
    before = one_line(text[max(0, start - 2 * width) : start])
    after = one_line(text[token.end : token.end + 2 * width])
    shown_before = _fitting(before[::-1], width)[::-1]
    shown_after = _fitting(after, width)
    word = one_line(text[start : token.end] or token.token)
    shown_word = _fitting(word, 2 * width)
    return Context(
        ("\u2026" if len(shown_before) < len(before) else "") + shown_before,
        shown_word + ("\u2026" if len(shown_word) < len(word) else ""),
        shown_after + ("\u2026" if len(shown_after) < len(after) else ""),
    )


def _fitting(text: str, width: int) -> str:
    """The longest beginning of a text that fits `width` columns."""
    used = 0
    for index, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return text[:index]
    return text


def strongest_sentences(attribution: Attribution, count: int) -> list[tuple[int, Span]]:
    """The sentences with the largest |score|, each with its rank, strongest first; the earlier if equal."""
    ordered = sorted(attribution.to_sentences(), key=lambda span: -abs(span.score))
    return list(enumerate(ordered[:count], start=1))


@dataclass(frozen=True)
class Bin:
    """The largest and the smallest score of neighbouring tokens that share one column of an overview."""

    positive: float
    negative: float


def bins(attribution: Attribution, count: int) -> list[Bin]:
    """The tokens of a prompt in at most `count` columns of equal width; tokens set aside count as 0."""
    scores = [
        0.0 if special else score for score, special in zip(attribution.scores.tolist(), attribution.aside, strict=True)
    ]
    columns = min(count, len(scores))
    columns_of_scores = (
        scores[column * len(scores) // columns : (column + 1) * len(scores) // columns] for column in range(columns)
    )
    return [Bin(max(0.0, *part), min(0.0, *part)) for part in columns_of_scores]


_KINDS = {
    "prediction": "the model\u2019s prediction {}",
    "token": "the next token {}",
    "contrast": "{}",
    "continuation": "the continuation {}",
    "answer": "the answer {}",
}


def heading(attribution: Attribution) -> str:
    """What is explained, in a few words."""
    return _KINDS.get(attribution.target.kind, "{}").format(attribution.target.label)


def _answer(attribution: Attribution) -> list[tuple[str, str]]:
    """What stands on top of every picture: what is explained, what else may come next, what is not ranked."""
    target = attribution.target
    facts = [("Target", f"{heading(attribution)}, {MEASURE_NAMES[target.measure]} {target.value:.4g}")]
    if attribution.next_tokens:
        facts.append(
            ("Likeliest", ", ".join(f"{one.token!r} {100 * one.probability:.3g} %" for one in attribution.next_tokens))
        )
    if any(attribution.aside):
        facts.append(("Set aside", _set_aside(attribution)))
    return facts


def _facts(attribution: Attribution) -> list[tuple[str, str]]:
    """How it was found: name and value of each fact."""
    facts = [
        ("Model", attribution.model),
        ("Rules", attribution.rules.describe()),
        ("Engine", attribution.engine or "not recorded"),
        ("Applied to", attribution.report.summary()),
        ("Baseline", f"token {attribution.baseline[0]}, {attribution.baseline[1]!r}"),
        ("Prompt", f"{len(attribution):,} tokens"),
    ]
    if attribution.memory:
        facts.append(("Memory", attribution.memory))
    if attribution.versions:
        facts.append(("Versions", ", ".join(f"{name} {v}" for name, v in attribution.versions.items())))
    return facts


def _set_aside(attribution: Attribution) -> str:
    """What the tokens that are not ranked add up to: a first special token, which attention rests on where it finds
    nothing, other special tokens, and a chat template's own."""
    scores = attribution.scores.tolist()
    groups: dict[str, list[int]] = {}
    for position, is_aside in enumerate(attribution.aside):
        if is_aside and position == 0 and attribution.special[0]:
            groups[f"the first token {attribution.tokens[0]!r} (attention sink)"] = [0]
        elif is_aside:
            groups.setdefault("special" if attribution.special[position] else "template", []).append(position)
    names = {"special": "{} special token{}", "template": "{} token{} of the chat template"}
    return ", ".join(
        f"{names.get(name, name).format(f'{len(group):,}', 's' if len(group) > 1 else '')} "
        f"{number(sum(scores[position] for position in group))}"
        for name, group in groups.items()
    )


def _warnings(attribution: Attribution) -> list[str]:
    """Parts of the model that a rule was meant for and does not act on."""
    return [f"{name}: {reason}" for name, reason in attribution.report.unsupported]


# -------------------------------------------------------------------------------------------------------- HTML

# Columns of the overview strip of a page; more than a screen shows would only make the file larger.
_STRIP_COLUMNS = 600
# Prompts of fewer tokens fit on a screen and need no overview.
_STRIP_FROM = 150
# A notebook output stays small: beyond this only the strongest sentences are shown.
_NOTEBOOK_TOKENS = 1000


@cache
def _environment() -> Environment:
    loader: BaseLoader = FunctionLoader(_template)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["one_line"] = one_line
    environment.filters["number"] = number
    return environment


def _template(name: str) -> str:
    return resources.files("gim").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def html(attribution: Attribution, *, top: int = 20, said: Said | None = None) -> str:
    """One page that needs nothing else: no network, no font, no script from elsewhere.

    Args:
        attribution: what to show.
        top: rows of the table of the strongest tokens.
        said: the answer that the attribution is of, whose tokens can then be asked one by one.

    Returns:
        The page, which can be encoded as UTF-8.
    """
    scale = Scale.of(attribution)
    ranked = attribution.top(top)
    sentences = strongest_sentences(attribution, 10)
    largest_sentence = max((abs(span.score) for _, span in sentences), default=0.0)
    segments = attribution.to_segments()
    largest_segment = max((abs(span.score) for span in segments), default=0.0)
    style = _style()
    script = _template("report.js")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            style=Markup(style),
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
            answer=_answer(attribution),
            facts=_facts(attribution),
            segments=[(span, _fraction(span.score, largest_segment)) for span in segments],
            warnings=_warnings(attribution),
            notes=attribution.report.notes,
            label=heading(attribution),
            scale=scale,
            aligned=scale.aligned,
            levels=LEVELS,
            ranked=[
                (token, context(attribution, token, 20), _fraction(token.score, scale.largest)) for token in ranked
            ],
            sentences=[(rank, span, _fraction(span.score, largest_sentence)) for rank, span in sentences],
            strip=_strip(attribution, scale) if len(attribution) >= _STRIP_FROM else None,
            lines=_lines(attribution, scale),
            count=len(attribution),
            said=said,
        )
    )


def _fraction(score: float, largest: float) -> float:
    """A score as a percentage of the largest, for the length of a bar."""
    return round(100 * score / largest, 2) if largest else 0.0


def _hash(content: str) -> str:
    """The name by which a content security policy allows one inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


@cache
def _style() -> str:
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
        _environment()
        .get_template("report.css.j2")
        .render(light=LIGHT, dark=DARK, variables=variables, classes=classes, strongest=LEVELS)
    )


def _lines(attribution: Attribution, scale: Scale) -> list[Markup]:
    """The running text in blocks, which end where a token ends a line, so that a browser lays out each alone."""
    scores, aside = attribution.scores.tolist(), attribution.aside
    lines: list[Markup] = []
    parts: list[str] = []
    for piece in pieces(attribution):
        shown = _with_line_ends(piece.text)
        if piece.position is None:
            parts.append(shown)
        else:
            score = scores[piece.position]
            is_aside = aside[piece.position]
            name = "s" if is_aside else _class(scale.level(score))
            if not piece.in_text and not is_aside:
                name = f"{name} e".strip()
            parts.append(f"<span id=t{piece.position}{_attribute('class', name)} data-s={number(score)}>{shown}</span>")
        if piece.in_text and piece.text.endswith("\n"):
            lines.append(Markup("".join(parts)))
            parts = []
    if parts:
        lines.append(Markup("".join(parts)))
    return lines


def _attribute(name: str, value: str) -> str:
    """An attribute of a tag; nothing where it would be empty. The values here are ours, never the prompt's."""
    return f' {name}="{value}"' if " " in value else f" {name}={value}" if value else ""


def _class(level: int) -> str:
    return f"p{level}" if level > 0 else f"n{-level}" if level < 0 else ""


def _with_line_ends(text: str) -> str:
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


def notebook(attribution: Attribution) -> str:
    """A piece of HTML for a notebook: facts, the strongest tokens and the text, with styles that stay inside.

    Args:
        attribution: what to show.

    Returns:
        HTML without a script; of a long prompt it has the strongest sentences only.
    """
    scale = Scale.of(attribution)
    scores, aside = attribution.scores.tolist(), attribution.aside

    def marked(part: Sequence[Piece]) -> Markup:
        shown = []
        for piece in part:
            text = str(escape(visible(piece.text))).replace("\n", "\u21b5\n")
            if piece.position is None:
                shown.append(text)
                continue
            name = "s" if aside[piece.position] else _class(scale.level(scores[piece.position]))
            title = f' title="{number(scores[piece.position])}"'
            shown.append(f"<span{_attribute('class', name)}{title}>{text}</span>")
        return Markup("".join(shown))

    everything = list(pieces(attribution))
    if len(attribution) <= _NOTEBOOK_TOKENS:
        parts = [marked(everything)]
    else:
        parts = [marked(part) for part in _excerpts(attribution, everything, 8, 200)]
    ramps = {
        name: [
            (f"{side}{level}", colour)
            for side, positive in (("p", True), ("n", False))
            for level, colour in enumerate(theme.ramp(positive), start=1)
        ]
        for name, theme in (("light", LIGHT), ("dark", DARK))
    }
    return (
        _environment()
        .get_template("notebook.html.j2")
        .render(
            answer=_answer(attribution),
            facts=_facts(attribution)[:3],
            warnings=_warnings(attribution),
            light=LIGHT,
            dark=DARK,
            ramps=ramps,
            scale=scale,
            parts=parts,
            is_whole=len(attribution) <= _NOTEBOOK_TOKENS,
            count=len(attribution),
            ranked=[(token, context(attribution, token, 30)) for token in attribution.top(10)],
        )
    )


def _excerpts(attribution: Attribution, everything: Sequence[Piece], count: int, longest: int) -> list[list[Piece]]:
    """The pieces of the strongest sentences in the order of the text, cut to `longest` around the strongest."""
    sizes, aside = attribution.scores.abs().tolist(), attribution.aside
    at = {piece.position: index for index, piece in enumerate(everything) if piece.position is not None}
    excerpts = []
    for _, span in sorted(strongest_sentences(attribution, count), key=lambda pair: pair[1].start):
        first, last = span.tokens
        if last - first > longest:
            # Tokens set aside that a sentence may enclose do not decide what is shown.
            middle = max(range(first, last), key=lambda p: -1.0 if aside[p] else sizes[p])
            first = max(first, min(middle - longest // 2, last - longest))
            last = first + longest
        if last > first:
            excerpts.append(_trimmed(everything[at[first] : at[last - 1] + 1]))
            if first > span.tokens[0]:
                excerpts[-1].insert(0, Piece("\u2026 ", None, False))
            if last < span.tokens[1]:
                excerpts[-1].append(Piece(" \u2026", None, False))
    return excerpts


def _trimmed(part: Sequence[Piece]) -> list[Piece]:
    """Pieces without the white space at both ends; a single one is left in any case."""
    kept = list(part)
    while len(kept) > 1 and kept[0].text.isspace():
        kept.pop(0)
    while len(kept) > 1 and kept[-1].text.isspace():
        kept.pop()
    kept[0] = replace(kept[0], text=kept[0].text.lstrip() or kept[0].text)
    return kept


# ---------------------------------------------------------------------------------------------------- terminal

_TERMINAL_TOKENS = 400
_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BLOCKS = " .:-=+*#@"


@dataclass(frozen=True)
class TerminalReport:
    """An attribution that rich can draw; without colour, signs in the text take the place of colours."""

    attribution: Attribution
    top: int = 10

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        attribution = self.attribution
        scale = Scale.of(attribution)
        colour = console.color_system is not None and not console.no_color
        yield self._grid(_answer(attribution))
        yield Text()
        yield self._table(scale, colour, options.max_width, options.ascii_only)
        yield Text()
        if attribution.segments:
            yield self._segments(scale, options.max_width)
            yield Text()
        if len(attribution) <= _TERMINAL_TOKENS:
            yield self._running(list(pieces(attribution)), scale, colour)
        else:
            yield from self._overview(scale, options.max_width, options.ascii_only)
            yield Text()
            yield Text("Strongest sentences, in the order of the text", style="bold")
            everything = list(pieces(attribution))
            for excerpt in _excerpts(attribution, everything, 6, 60):
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

    def _grid(self, facts: Sequence[tuple[str, str]]) -> Table:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts:
            grid.add_row(name, Text(one_line(value), style="bold" if name == "Target" else ""))
        return grid

    def _segments(self, scale: Scale, width: int) -> Table:
        """What each named part of the text adds up to."""
        table = Table(
            title="Parts of the prompt", title_justify="left", title_style="bold", box=None, pad_edge=False,
            show_header=False,
        )  # fmt: skip
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True, style="dim")
        spans = self.attribution.to_segments()
        names = [_fitting(one_line(span.name), width // 3) for span in spans]
        scores = [scale.aligned(span.score) for span in spans]
        room = width - max(map(cell_len, names)) - max(map(cell_len, scores)) - 3
        for name, score, span in zip(names, scores, spans, strict=True):
            style = _terminal_style(LEVELS // 4 if span.score > 0 else -LEVELS // 4)
            text = one_line(span.text)
            shown = _fitting(text, room)
            shown = shown if shown == text else _fitting(text, room - 1) + "\u2026"
            table.add_row(Text(name), Text(score, style=style), Text(shown))
        return table

    def _card(self) -> Panel:
        grid = self._grid(_facts(self.attribution))
        for warning in _warnings(self.attribution):
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
        for sign, style in (("+", _terminal_style(LEVELS // 4)), ("-", _terminal_style(-LEVELS // 4))):
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
        for token in self.attribution.top(self.top):
            found = context(self.attribution, token, room)
            style = _terminal_style(LEVELS // 4 if token.score > 0 else -LEVELS // 4)
            bar = ("#" if ascii_only else "\u2588") * round(
                12 * abs(token.score) / scale.largest if scale.largest else 0
            )
            cells: list[Text | str] = [str(token.rank), Text(scale.aligned(token.score), style=style)]
            if width >= 60:
                cells.append(Text(bar, style=style))
            word = found.token if colour else f"[{found.token}]"
            cells += [
                f"{token.position:,}",
                Text.assemble((found.before, "dim"), (word, f"bold {style}"), (found.after, "dim")),
            ]
            table.add_row(*cells)
        return table


def _terminal_style(level: int) -> str:
    """A style that is legible on dark and on light terminals: coloured text, then a filled background."""
    if abs(level) < LEVELS // 10:
        return ""
    if abs(level) < LEVELS // 2:
        return "#c76a10" if level > 0 else "#3f8fd2"
    filled = LIGHT.ramp(level > 0)[abs(level) - 1]
    return f"{LIGHT.text} on {filled}"


def _bracketed(text: str, sign: str) -> str:
    """The text with its visible part between signs."""
    core = text.strip()
    if not core:
        return text
    before, _, after = text.partition(core)
    return f"{before}[{sign}{core}{sign}]{after}"


def terminal(attribution: Attribution, *, top: int = 10) -> TerminalReport:
    """The attribution for :meth:`rich.console.Console.print`.

    Args:
        attribution: what to show; of a long prompt, an overview and the strongest sentences.
        top: rows of the table of the strongest tokens.

    Returns:
        An object that rich draws.
    """
    return TerminalReport(attribution, top)


# ----------------------------------------------------------------------------------------------------- picture

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
_PICTURE_INK = LIGHT.text
_PICTURE_SOFT = "#5b606b"
_PICTURE_POSITIVE = "#d9711c"
_PICTURE_NEGATIVE = "#3383c4"


@dataclass(frozen=True)
class _Cell:
    """A part of one row of monospaced text: its first column, its width in columns, and its step of colour."""

    column: int
    width: int
    text: str
    level: int


def png(attribution: Attribution, *, top: int = 15) -> bytes:
    """A picture: facts, scores along the prompt, the strongest tokens, and the text or its strongest sentences.

    Args:
        attribution: what to show.
        top: bars of the strongest tokens.

    Returns:
        The content of a PNG file.

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

    scale = Scale.of(attribution)
    ranked = attribution.top(top)
    facts = [f"{name}: {one_line(value)}" for name, value in [*_answer(attribution), *_facts(attribution)[:5]]]
    facts += [f"Not covered: {one_line(warning)}" for warning in _warnings(attribution)]
    rows = _picture_rows(attribution, scale)
    # Heights of the four parts in inches; a row of text has a fifth of one.
    heights = [0.16 * len(facts) + 0.1, 1.25, 0.19 * max(1, len(ranked)) + 0.1, 0.2 * max(1, len(rows)) + 0.1]
    gaps = [0.2, 0.3, 0.5, 0.4]
    total = sum(heights) + sum(gaps) + 0.35

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
        figure = Figure(figsize=(_PICTURE_WIDTH, total), facecolor="white")
        FigureCanvasAgg(figure)
        upper = total
        areas = []
        for gap, size in zip(gaps, heights, strict=True):
            upper -= gap + size
            areas.append(figure.add_axes((0.06, upper / total, 0.91, size / total)))
        _draw_facts(areas[0], facts)
        _draw_along(areas[1], attribution, scale)
        monospace = ["DejaVu Sans Mono", *fallbacks]
        _draw_top(areas[2], attribution, ranked, monospace)
        _draw_rows(areas[3], rows, len(attribution.text) <= _PICTURE_CHARACTERS, monospace)
        figure.text(0.06, 0.12 / total, scale.describe(), fontsize=6.5, color=_PICTURE_SOFT)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=_PICTURE_DPI, metadata={"Software": "gim-kernels"})
    return content.getvalue()


def _picture_rows(attribution: Attribution, scale: Scale) -> list[list[_Cell]]:
    """The text, or its strongest sentences, wrapped to rows of equal width."""
    everything = list(pieces(attribution))
    is_whole = len(attribution.text) <= _PICTURE_CHARACTERS
    parts = [everything] if is_whole else _excerpts(attribution, everything, 6, 60)
    scores, aside = attribution.scores.tolist(), attribution.aside
    rows: list[list[_Cell]] = []
    for part in parts:
        row: list[_Cell] = []
        column = 0
        for piece in part:
            level = 0
            if piece.position is not None and not aside[piece.position]:
                level = scale.level(scores[piece.position])
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


def _draw_facts(axes: Axes, facts: Sequence[str]) -> None:
    axes.set_axis_off()
    for index, fact in enumerate(facts):
        axes.text(
            0,
            1 - (index + 0.5) / len(facts),
            fact if len(fact) < 150 else fact[:149] + "\u2026",
            transform=axes.transAxes,
            va="center",
            fontsize=9 if index == 0 else 7.5,
            fontweight="bold" if index == 0 else "normal",
            color=_PICTURE_INK if index == 0 else _PICTURE_SOFT,
        )


def _draw_along(axes: Axes, attribution: Attribution, scale: Scale) -> None:
    columns = bins(attribution, 800)
    places = [(index + 0.5) * len(attribution) / len(columns) for index in range(len(columns))]
    width = max(len(attribution) / max(1, len(columns)), len(attribution) / 500)
    axes.bar(places, [column.positive for column in columns], width, color=_PICTURE_POSITIVE)
    axes.bar(places, [column.negative for column in columns], width, color=_PICTURE_NEGATIVE)
    axes.axhline(0, color=_PICTURE_INK, linewidth=0.6)
    axes.set_xlim(0, max(1, len(attribution)))
    end = scale.largest * 1.08 or 1.0
    axes.set_ylim(-end, end)
    axes.set_title("Scores along the prompt, by token", loc="left", fontsize=8, fontweight="bold")
    axes.tick_params(length=2, labelsize=7, colors=_PICTURE_SOFT)
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
        axes.text(0.045, row, f"{token.position}", ha="right", color=_PICTURE_SOFT, **style)
        axes.text(0.31, row, found.before, ha="right", color=_PICTURE_SOFT, **style)
        word = axes.text(0.31, row, found.token, ha="left", color=_PICTURE_INK, fontweight="bold", **style)
        axes.annotate(found.after, xy=(1, 0.5), xycoords=word, ha="left", color=_PICTURE_SOFT, **style)
        axes.barh(row, 0.3 * abs(token.score) / largest, left=0.62, height=0.7, color=colour)
        axes.text(0.63 + 0.3 * abs(token.score) / largest, row, number(token.score), va="center", fontsize=7.5)


def _draw_rows(axes: Axes, rows: Sequence[Sequence[_Cell]], is_whole: bool, monospace: list[str]) -> None:
    from matplotlib.patches import Rectangle

    title = "The prompt" if is_whole else "Strongest sentences, in the order of the text"
    axes.set_title(title, loc="left", fontsize=8, fontweight="bold")
    axes.set_axis_off()
    axes.set_xlim(0, _PICTURE_COLUMNS)
    axes.set_ylim(max(1, len(rows)), 0)
    ramps = {True: LIGHT.ramp(True), False: LIGHT.ramp(False)}
    # A character of the font is 0.602 of its size wide, and a column is this many points.
    size = _PICTURE_WIDTH * axes.get_position().width * 72 / _PICTURE_COLUMNS / 0.602
    for index, row in enumerate(rows):
        for cell in row:
            if cell.level:
                colour = ramps[cell.level > 0][abs(cell.level) - 1]
                axes.add_patch(Rectangle((cell.column, index + 0.05), cell.width, 0.9, facecolor=colour, linewidth=0))
            axes.text(
                cell.column,
                index + 0.52,
                cell.text,
                va="center",
                family=monospace,
                fontsize=size,
                color=_PICTURE_INK,
            )
