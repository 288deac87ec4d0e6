"""A prompt cut into what a view shows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gim.report.text import fitting, one_line

if TYPE_CHECKING:
    from gim.attribution import Attribution, RankedToken, Span


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
    character (a special one, one that says nothing, or a further part of a character that the token before it
    began) has a piece that is not of the text.
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
        else:
            # What a tokenizer adds (a space in front of the text) and parts of a character have no glyph.
            own = attribution.tokens[position]
            has_own = attribution.special[position] or (start == end and own.strip(" \ufffd"))
            yield Piece(own if has_own else "\u00b7", position, False)
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
    shown_before = fitting(before[::-1], width)[::-1]
    shown_after = fitting(after, width)
    word = one_line(text[start : token.end] or token.token)
    shown_word = fitting(word, 2 * width)
    return Context(
        ("\u2026" if len(shown_before) < len(before) else "") + shown_before,
        shown_word + ("\u2026" if len(shown_word) < len(word) else ""),
        shown_after + ("\u2026" if len(shown_after) < len(after) else ""),
    )


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


def excerpts(attribution: Attribution, everything: Sequence[Piece], count: int, longest: int) -> list[list[Piece]]:
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
