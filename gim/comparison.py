"""Two results beside one another: of two sets of rules, two models or two prompts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from gim.attribution import Attribution, Span, data_frame
from gim.files import written
from gim.targets import MEASURE_NAMES, counted

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType


@dataclass(frozen=True)
class WordPair:
    """A word of the first text and the same word of the second; None where a text lacks it.

    Args:
        first, second: the word with its score.
        shares: its score over the sum of all words' absolute scores, in each; 0 where it is missing.
    """

    first: Span | None
    second: Span | None
    shares: tuple[float, float]

    @property
    def text(self) -> str:
        """The word."""
        found = self.first or self.second
        assert found is not None, "one of them is there"
        return found.text

    @property
    def change(self) -> float:
        """The second share minus the first."""
        return self.shares[1] - self.shares[0]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Two attributions word by word.

    Words, because two models cut a text into tokens of their own. Scores of two models or of two explained numbers have
    scales of their own, so words are compared by their shares of all that a result gives to words.

    Args:
        first, second: the attributions.
    """

    first: Attribution
    second: Attribution

    @cached_property
    def words(self) -> tuple[WordPair, ...]:
        """Every word of both texts, in their order. Where the texts differ, words belong together that stand in common
        runs, as difflib finds them."""
        sides = (self.first.to_words(), self.second.to_words())
        totals = [sum(abs(span.score) for span in side) or 1.0 for side in sides]

        def pair(first: Span | None, second: Span | None) -> WordPair:
            shares = [
                0.0 if one is None else one.score / total for one, total in zip((first, second), totals, strict=True)
            ]
            return WordPair(first, second, (shares[0], shares[1]))

        if self.first.text == self.second.text and len(sides[0]) == len(sides[1]):
            return tuple(map(pair, *sides))
        found: list[WordPair] = []
        texts = [[span.text for span in side] for side in sides]
        for kind, a, b, c, d in SequenceMatcher(None, texts[0], texts[1]).get_opcodes():
            if kind == "equal":
                found += map(pair, sides[0][a:b], sides[1][c:d])
            else:
                found += [pair(one, None) for one in sides[0][a:b]]
                found += [pair(None, one) for one in sides[1][c:d]]
        return tuple(found)

    @property
    def correlation(self) -> float | None:
        """Pearson's, of the scores of the words that both have; None where fewer than three are, since two always
        lie on a line, or all are alike."""
        pairs = [(one.first.score, one.second.score) for one in self.words if one.first and one.second]
        if len(pairs) < 3:
            return None
        found = float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64, device="cpu").mT)[0, 1])
        return found if found == found else None

    def changes(self, k: int = 10) -> list[WordPair]:
        """The words whose share differs most, most first; of equal ones the earlier first.

        Raises:
            ValueError: ``k`` below 1.
        """
        return sorted(self.words, key=lambda one: -abs(one.change))[: counted("k", k)]

    def differences(self) -> list[tuple[str, str, str]]:
        """What the two were made with that is not the same: name, and what each says."""
        named = [
            (
                ("Model", one.model),
                ("Rules", one.rules.describe()),
                ("Target", f"{one.target.label}, {MEASURE_NAMES[one.target.measure]} {one.target.value:.4g}"),
                ("Baseline", repr(one.baseline[1])),
                ("Engine", one.engine),
                ("Tokens", f"{len(one):,}"),
                ("Prompt", one.text if len(one.text) <= 60 else f"{one.text[:60]}\u2026"),
            )
            for one in (self.first, self.second)
        ]
        found = [(name, a, b) for (name, a), (_, b) in zip(*named, strict=True) if a != b]
        if self.first.text != self.second.text and all(name != "Prompt" for name, *_ in found):
            found.append(("Prompt", "the same beginning", "another end"))
        return found

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each word.

        Returns:
            Columns ``word``, ``first_start``, ``second_start`` (characters, None where a text lacks the word),
            ``first_score``, ``second_score``, ``first_share``, ``second_share`` and ``change``.

        Raises:
            ImportError: pandas, which the extra ``evaluate`` installs, is missing.
        """
        words = self.words
        return data_frame(
            {
                "word": [one.text for one in words],
                "first_start": [one.first and one.first.start for one in words],
                "second_start": [one.second and one.second.start for one in words],
                "first_score": [one.first and one.first.score for one in words],
                "second_score": [one.second and one.second.score for one in words],
                "first_share": [one.shares[0] for one in words],
                "second_share": [one.shares[1] for one in words],
                "change": [one.change for one in words],
            }
        )

    def to_html(self, path: str | os.PathLike[str] | None = None, *, top: int = 20) -> str:
        """Both on one self-contained page that loads nothing.

        Args:
            path: a file to write it to as well, in one step.
            top: rows of the table of the words whose share differs most.

        Raises:
            OSError: the file cannot be written.
        """
        from gim.report import comparison

        return written(comparison.page(self, top=top), path)

    def __rich__(self) -> RenderableType:
        from gim.report import comparison

        return comparison.view(self)

    def __repr__(self) -> str:
        correlation = self.correlation
        said = "no correlation" if correlation is None else f"correlation {correlation:.3f}"
        return f"Comparison({self.first!r}, {self.second!r}, {said})"
