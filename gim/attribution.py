"""The result of an explanation: a score for each token of a prompt, and what it is a score of."""

from __future__ import annotations

import math
import operator
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch

from gim import saved, segments
from gim.applied import AppliedReport
from gim.files import check_writable, write_atomically, written
from gim.rules import Rules
from gim.targets import Explained, NextToken, counted, whole_numbers

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType

    from gim.comparison import Comparison

Order = Literal["abs", "positive", "negative"]
ORDERS: tuple[Order, ...] = ("abs", "positive", "negative")

__all__ = ["Attribution", "Order", "RankedToken", "Span", "check_writable", "write_atomically"]


@dataclass(frozen=True)
class RankedToken:
    """One token with its place in an order of all tokens.

    Args:
        rank: 1 for the first.
        position: index of the token in the attribution.
        token: its display string.
        score: its score.
        start: first character of the token in the text.
        end: one past its last character; equal to `start` for a token that is not in the text.
    """

    rank: int
    position: int
    token: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Span:
    """A range of the text with the sum of the scores in it.

    Args:
        text: the characters of the range; for a special token that is not in the text, the token's own.
        start: first character.
        end: one past the last character.
        score: sum of the shares of all tokens in the range.
        tokens: first and one-past-last position of the tokens that have a share; equal where none has.
        name: the name given to the range, if one was.
    """

    text: str
    start: int
    end: int
    score: float
    tokens: tuple[int, int]
    name: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Scores of the tokens of a prompt, with everything needed to say what they are.

    A score is (embedding - baseline embedding) . gradient of the explained number with respect to the
    embedding, under the backward rules that are named here.

    Scores are summed over words, sentences and other ranges by one rule: **a token's score is divided among
    ranges in proportion to how many of its characters that are not white space each contains**. So " lantern"
    belongs wholly to "lantern", and ".The" gives a quarter to ".". A token of white space only is divided by
    its characters, and a token without characters lies wholly where it stands. In words and sentences, which
    leave white space between them, such tokens count for the word or sentence that follows, or for the last
    one. The sum over all words, or all sentences, thus equals the sum over all tokens they are made of.

    Args:
        text: the prompt.
        tokens: display string of each token, a special token's own text included.
        token_ids: id of each token.
        offsets: first and one-past-last character of each token in `text`; (k, k) for a token that is not in
            the text. Tokens that are parts of one character have the range of that character.
        scores: score of each token, shape [T], float32, on the CPU, finite.
        special: whether each token is a special one, such as a begin-of-text token.
        target: what was explained, and its value.
        rules: the backward rules.
        engine: the code that ran attention.
        report: what was applied to which module.
        model: name or path of the model.
        baseline: id and text of the token that every token is compared with.
        versions: version of each package that took part.
        memory: how memory was spent, in words.
        template: whether each token is a chat template's own; empty where none is.
        segments: parts of the text by name, each its first and one-past-last character: the messages of a chat by
            role, or what was given.
        next_tokens: the likeliest tokens, or classes, where the explained number is read, likeliest first.

    Raises:
        ValueError: sequences of different lengths, offsets outside the text, scores that are not a finite
            float32 vector on the CPU.
        TypeError: scores that are not a tensor.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    scores: torch.Tensor
    special: tuple[bool, ...]
    target: Explained
    rules: Rules
    engine: str
    report: AppliedReport
    model: str
    baseline: tuple[int, str]
    versions: dict[str, str] = field(default_factory=dict)
    memory: str = ""
    template: tuple[bool, ...] = ()
    segments: dict[str, tuple[int, int]] = field(default_factory=dict)
    next_tokens: tuple[NextToken, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scores, torch.Tensor):
            raise TypeError(f"scores must be a tensor, got {type(self.scores).__name__}")
        if self.scores.dim() != 1:
            raise ValueError(f"scores must have shape [T], got {list(self.scores.shape)}")
        if self.scores.dtype != torch.float32 or self.scores.device.type != "cpu":
            raise ValueError(f"scores must be float32 on the CPU, got {self.scores.dtype} on {self.scores.device}")
        if self.scores.requires_grad:
            raise ValueError("scores must not require a gradient; detach them")
        for name in ("token_ids", "offsets", "scores", "special"):
            if len(getattr(self, name)) != len(self.tokens):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.tokens)} tokens, "
                    f"got {len(getattr(self, name))}"
                )
        if self.template and len(self.template) != len(self.tokens):
            raise ValueError(
                f"template must have one entry for each of the {len(self.tokens)} tokens or none, got "
                f"{len(self.template)}"
            )
        for name, (start, end) in self.segments.items():
            self._check_range(f"segments[{name!r}]", start, end)
        finite = torch.isfinite(self.scores)
        if not bool(finite.all()):
            position = int(torch.nonzero(~finite)[0, 0])
            raise ValueError(
                f"scores must be finite, but token {position} ({self.tokens[position]!r}) has "
                f"{self.scores[position].item()}"
            )
        for position, (start, end) in enumerate(self.offsets):
            if not 0 <= start <= end <= len(self.text):
                raise ValueError(
                    f"offsets of token {position} must satisfy 0 <= start <= end <= {len(self.text)} "
                    f"(the length of the text), got ({start}, {end})"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Attribution):
            return NotImplemented
        return torch.equal(self.scores, other.scores) and self._fields() == other._fields()

    # A tensor has no hash of its value.
    __hash__ = None  # type: ignore[assignment]

    def _fields(self) -> dict[str, Any]:
        """Every field except the scores."""
        return {name: value for name, value in vars(self).items() if name != "scores"}

    @property
    def aside(self) -> tuple[bool, ...]:
        """Whether each token is a special one or a chat template's own: no word of the prompt, so not ranked."""
        return tuple(map(operator.or_, self.special, self.template)) if self.template else self.special

    # -- single tokens

    def top(self, k: int = 10, *, by: Order = "abs", skip_special: bool = True) -> list[RankedToken]:
        """The strongest tokens, strongest first; of equal scores the earlier token first.

        Args:
            k: how many, at most.
            by: ``"abs"`` orders by absolute value; ``"positive"`` gives only scores above 0, largest first;
                ``"negative"`` only scores below 0, smallest first.
            skip_special: leave special tokens and a chat template's own out, also out of the ranks.

        Returns:
            At most `k` tokens.

        Raises:
            ValueError: `k` below 1, or an order that does not exist.
        """
        k = counted("k", k)
        ranked = []
        for rank, position in enumerate(self._order(by, skip_special)[:k], start=1):
            token = self._ranked(rank, position)
            if (by == "positive" and token.score <= 0) or (by == "negative" and token.score >= 0):
                break
            ranked.append(token)
        return ranked

    def best_in(self, start: int, end: int, *, by: Order = "positive", skip_special: bool = True) -> RankedToken:
        """The best-ranked token that has a character in a range of the text: where does a statement rank?

        Args:
            start: first character of the range.
            end: one past its last character.
            by: the order that ranks refer to, as in :meth:`top`; here every token has a rank in it.
            skip_special: leave special tokens out, also out of the ranks.

        Returns:
            The token of the range with the smallest rank among all tokens.

        Raises:
            ValueError: a range outside the text, or one that no token has a character in.
        """
        self._check_range("the range", start, end)
        for rank, position in enumerate(self._order(by, skip_special), start=1):
            token_start, token_end = self.offsets[position]
            if token_start < end and token_end > start:
                return self._ranked(rank, position)
        raise ValueError(f"no token has a character in the range ({start}, {end})")

    def _order(self, by: Order, skip_special: bool) -> list[int]:
        """Positions of all tokens, first rank first."""
        if by not in ORDERS:
            raise ValueError(f"by must be one of {ORDERS}, got {by!r}")
        key = {"abs": self.scores.abs(), "positive": self.scores, "negative": -self.scores}[by]
        order: list[int] = torch.argsort(key, descending=True, stable=True).tolist()
        aside = self.aside
        return [position for position in order if not (skip_special and aside[position])]

    def _ranked(self, rank: int, position: int) -> RankedToken:
        start, end = self.offsets[position]
        return RankedToken(rank, position, self.tokens[position], float(self.scores[position]), start, end)

    # -- sums over ranges

    def to_words(self, *, skip_special: bool = True) -> list[Span]:
        """Scores summed over words, punctuation marks and symbols, as :func:`gim.segments.words` cuts them.

        Args:
            skip_special: leave special tokens and a chat template's own out; otherwise each is a span of its own.

        Returns:
            One span for each, in the order of the text; together they have every character of the text that
            is neither white space nor part of such a token.
        """
        return self._segmented(segments.words, skip_special)

    def to_sentences(self, *, skip_special: bool = True) -> list[Span]:
        """Scores summed over sentences, as :func:`gim.segments.sentences` cuts them.

        Args:
            skip_special: leave special tokens and a chat template's own out; otherwise each is a span of its own.

        Returns:
            One span for each, in the order of the text; together they have every character of the text that
            is neither white space nor part of such a token.
        """
        return self._segmented(segments.sentences, skip_special)

    def spans(
        self,
        spans: Iterable[tuple[int, int]] | Mapping[str, tuple[int, int]],
        *,
        skip_special: bool = True,
    ) -> list[Span]:
        """Scores summed over given ranges of the text, which may overlap and leave parts out.

        Args:
            spans: first and one-past-last character of each range, or such ranges by name.
            skip_special: leave special tokens and a chat template's own out of the sums.

        Returns:
            One span for each range, in the order given.

        Raises:
            TypeError: something else than ranges; names it.
            ValueError: a range that is empty or outside the text.
        """
        given: Any = spans
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(f"spans must be a list of (start, end), or such by name, got {given!r:.80}")
        named = spans.items() if isinstance(spans, Mapping) else (("", one) for one in spans)
        names, ranges = [], []
        for index, (name, one) in enumerate(named):
            where, ends = f"spans[{str(name) or index!r}]", whole_numbers(one) or []
            if len(ends) != 2 or not all(type(end) is int for end in ends):
                raise TypeError(f"{where} must be (start, end), two whole numbers, got {one!r:.80}")
            self._check_range(where, *ends)
            names.append(str(name))
            ranges.append((ends[0], ends[1]))
        return [
            Span(self.text[start:end], start, end, score, tokens, name)
            for name, (start, end), (score, tokens) in zip(names, ranges, self._sums(ranges, skip_special), strict=True)
        ]

    def to_segments(self) -> list[Span]:
        """Scores summed over :attr:`segments`, such as the messages of a chat.

        Returns:
            One span for each, with its name, in the order of the text.
        """
        return self.spans(self.segments)

    def _check_range(self, name: str, start: int, end: int) -> None:
        if not 0 <= start < end <= len(self.text):
            raise ValueError(
                f"{name} must satisfy 0 <= start < end <= {len(self.text)} (the length of the text), "
                f"got ({start}, {end})"
            )

    def _segmented(self, cut: Callable[[str], Sequence[tuple[int, int]]], skip_special: bool) -> list[Span]:
        """One span for each range that `cut` finds between tokens set aside, and for each of those."""
        aside = self.aside
        specials = [
            Span(
                self.text[start:end] if end > start else self.tokens[position],
                start,
                end,
                float(self.scores[position]),
                (position, position + 1),
            )
            for position, (start, end) in enumerate(self.offsets)
            if aside[position]
        ]
        ranges: list[tuple[int, int]] = []
        start = 0
        for stop, after in [*((s.start, s.end) for s in specials if s.end > s.start), (len(self.text),) * 2]:
            ranges += [(start + a, start + b) for a, b in cut(self.text[start:stop])]
            start = max(start, after)
        if not ranges and not all(aside):
            ranges = [(0, len(self.text))]

        # Each range also takes in what lies between it and the one before, and the last what follows it:
        # these cells leave out nothing, so no token's share is lost.
        cells = list(pairwise([0, *(end for _, end in ranges[:-1]), len(self.text)])) if ranges else []
        spans = [
            Span(self.text[start:end], start, end, score, tokens)
            for (start, end), (score, tokens) in zip(ranges, self._sums(cells, True), strict=True)
        ]
        if skip_special:
            return spans
        return sorted([*specials, *spans], key=lambda span: (span.start, span.end, span.tokens))

    def _sums(self, ranges: Sequence[tuple[int, int]], skip_special: bool) -> list[tuple[float, tuple[int, int]]]:
        """For each range the sum of the tokens' shares, and first and one-past-last token with a share."""
        visible = [0, *accumulate(not character.isspace() for character in self.text)]
        scores: list[float] = self.scores.tolist()
        aside = self.aside
        positions = [p for p in range(len(self)) if not (skip_special and aside[p])]
        positions.sort(key=lambda position: self.offsets[position])
        starts = [self.offsets[position][0] for position in positions]
        # The furthest end up to each token: where it is before a range, so is every token up to there.
        ends = list(accumulate((self.offsets[position][1] for position in positions), max))

        sums = []
        for start, end in ranges:
            shares = []
            contributing = []
            # A token without characters at `start` has its end there, and one at the end of the text has its
            # start there; hence both bounds are taken in, and _share decides.
            for position in positions[bisect_left(ends, start) : bisect_right(starts, end)]:
                share = _share(visible, self.offsets[position], start, end)
                if share > 0:
                    shares.append(share * scores[position])
                    contributing.append(position)
            if contributing:
                tokens = (min(contributing), max(contributing) + 1)
            else:
                before = sum(offset[0] < start for offset in self.offsets)
                tokens = (before, before)
            sums.append((math.fsum(shares), tokens))
        return sums

    # -- other forms

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as :meth:`to_json` writes it."""
        return saved.to_fields(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each token, in order.

        Returns:
            Columns ``position``, ``token``, ``token_id``, ``start`` and ``end`` (characters of the text), ``score``,
            ``special``, ``template``, and ``segment``: the name of the first part that has a character of the token.

        Raises:
            ImportError: pandas, which the extra ``evaluate`` installs, is missing.
        """
        starts, ends = ([offset[side] for offset in self.offsets] for side in (0, 1))
        return data_frame(
            {
                "position": range(len(self)),
                "token": self.tokens,
                "token_id": self.token_ids,
                "start": starts,
                "end": ends,
                "score": self.scores.numpy(),
                "special": self.special,
                "template": self.template or (False,) * len(self),
                "segment": [
                    next((name for name, (a, b) in self.segments.items() if a < max(end, start + 1) and start < b), "")
                    for start, end in self.offsets
                ],
            }
        )

    def compare(self, other: Attribution) -> Comparison:
        """This result beside another: of other rules, another model or another prompt.

        Raises:
            TypeError: the other is no attribution.
        """
        from gim.comparison import Comparison

        if not isinstance(other, Attribution):
            raise TypeError(f"other must be an Attribution, got {type(other).__name__}")
        return Comparison(self, other)

    # -- save, load

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The attribution as JSON, from which :meth:`from_json` makes an equal one; scores to the last bit.

        Args:
            path: a file to write it to as well, in one step: a reader never sees half a file.

        Returns:
            The JSON text.

        Raises:
            OSError: the file cannot be written.
        """
        return written(saved.to_document(self.to_dict()), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str], *, max_bytes: int = saved.MAX_BYTES) -> Attribution:
        """The inverse of :meth:`to_json`.

        Args:
            source: a path, or the JSON text itself: a string that starts with a brace or has several lines. A
                byte-order mark may stand in front.
            max_bytes: the longest file or text that is read; by default about three million tokens.

        Returns:
            The attribution.

        Raises:
            OSError: the file cannot be read.
            ValueError: too long, not JSON, not an attribution, or one of another schema version; a field that is
                missing, or has another type or length than it must have.
        """
        return cls(**saved.read(source, max_bytes))

    # -- to look

    def to_html(self, path: str | os.PathLike[str] | None = None, *, top: int = 20) -> str:
        """The attribution as one self-contained HTML page that loads nothing.

        Args:
            path: a file to write it to as well, in one step.
            top: rows of the table of the strongest tokens.

        Returns:
            The page.

        Raises:
            OSError: the file cannot be written.
        """
        from gim.report import html

        return written(html.page(self, top=top), path)

    def to_png(self, path: str | os.PathLike[str], *, top: int = 15) -> None:
        """Draw the attribution as a picture.

        Args:
            path: the PNG file to write, in one step.
            top: bars of the strongest tokens.

        Raises:
            ImportError: matplotlib, which the extra ``report`` installs, is missing.
            OSError: the file cannot be written.
        """
        from gim.report import picture

        write_atomically(path, picture.png(self, top=top))

    def _repr_html_(self) -> str:
        from gim.report import notebook

        return notebook.cell(self)

    def __rich__(self) -> RenderableType:
        from gim.report import terminal

        return terminal.view(self)

    def __repr__(self) -> str:
        strongest = ", ".join(f"{token.token!r} {token.score:+.3g}" for token in self.top(3))
        return (
            f"Attribution({len(self)} tokens, model={self.model!r}, target={self.target.label!r}, "
            f"rules={self.rules.name}, engine={self.engine!r}, strongest: {strongest or 'none'})"
        )


def data_frame(columns: Mapping[str, Any]) -> pandas.DataFrame:
    """Columns as a data frame.

    Raises:
        ImportError: pandas, which the extra ``evaluate`` installs, is missing.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a data frame needs pandas: pip install gim-kernels[evaluate]") from error
    return pandas.DataFrame(columns)


def _share(visible: Sequence[int], offset: tuple[int, int], start: int, end: int) -> float:
    """The part of a token that lies in a range, from 0 to 1; see :class:`Attribution` for the rule.

    Args:
        visible: for each place in the text the number of characters before it that are not white space.
        offset: first and one-past-last character of the token.
        start: first character of the range.
        end: one past its last character.
    """
    first, last = offset
    if first == last:
        # The last range of a text also holds what stands behind its last character.
        return 1.0 if start <= first < end or first == end == len(visible) - 1 else 0.0
    low, high = max(first, start), min(last, end)
    if low >= high:
        return 0.0
    if visible[last] == visible[first]:
        return (high - low) / (last - first)
    return (visible[high] - visible[low]) / (visible[last] - visible[first])
