"""The result of explaining a whole answer: a score for each token of it and each token before."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from gim import saved
from gim.attribution import Attribution, Span, data_frame
from gim.files import write_atomically, written
from gim.segments import Range
from gim.targets import Explained, NextToken, whole_number

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType

#: What an axis of a table can be made of.
Unit = Literal["token", "word", "sentence", "segment"]
#: How the note begins that a report has of an answer whose attribution was cut.
INTERRUPTED = "interrupted: "


@dataclass(frozen=True, eq=False)
class AnswerTable:
    """Scores of parts of an answer for parts of what stands before it.

    Args:
        rows: parts of the answer; their characters count in the answer's text. Their own scores are sums of ``total``.
        prompt, answer: the columns: parts of the prompt, then of the answer. None has tokens of both.
        scores: ``[rows, prompt + answer]``, float32.
    """

    rows: tuple[Span, ...]
    prompt: tuple[Span, ...]
    answer: tuple[Span, ...]
    scores: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class AnswerAttribution:
    """Scores of a prompt's tokens, and of an answer's earlier tokens, for every token of the answer.

    Args:
        prompt: the prompt's tokens with their scores for the whole answer, which has their target.
        answer: the answer's text.
        tokens: display string of each of its A tokens.
        offsets: first and one-past-last character of each in ``answer``.
        special: whether each is a special one.
        scores: ``[A, P + A]``, float32, on the CPU, finite: row i for answer token i, columns for the P tokens of the
            prompt and then the answer's; 0 from the token's own on.
        total: ``[P + A]``, the same for the whole answer.
        targets: what each row explains, with its value.
        next_tokens: the likeliest tokens where each row is read, and last the row's own where it is none of them.

    Raises:
        ValueError: shapes that do not fit, scores that are not finite float32 numbers on the CPU.
    """

    prompt: Attribution
    answer: str
    tokens: tuple[str, ...]
    offsets: tuple[Range, ...]
    special: tuple[bool, ...]
    scores: torch.Tensor
    total: torch.Tensor
    targets: tuple[Explained, ...]
    next_tokens: tuple[tuple[NextToken, ...], ...]

    def __post_init__(self) -> None:
        count, width = len(self.tokens), len(self.prompt) + len(self.tokens)
        for name, shape in (("scores", (count, width)), ("total", (width,))):
            given = getattr(self, name)
            if tuple(given.shape) != shape or given.dtype != torch.float32 or given.device.type != "cpu":
                raise ValueError(
                    f"{name} must be float32 of shape {list(shape)} on the CPU, got {given.dtype} of "
                    f"{list(given.shape)} on {given.device}"
                )
            if not bool(torch.isfinite(given).all()):
                raise ValueError(f"{name} must be finite")
        for name in ("offsets", "special", "targets", "next_tokens"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have one entry for each of the {count} tokens of the answer")
        for place, (start, end) in enumerate(self.offsets):
            if not 0 <= start <= end <= len(self.answer):
                raise ValueError(f"offsets of answer token {place} lie outside the answer: ({start}, {end})")

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AnswerAttribution):
            return NotImplemented
        tensors = ("scores", "total")
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in tensors) and all(
            getattr(self, one.name) == getattr(other, one.name)
            for one in dataclasses.fields(self)
            if one.name not in tensors
        )

    # Tensors have no hash of their values.
    __hash__ = None  # type: ignore[assignment]

    @property
    def text(self) -> str:
        """The prompt and the answer."""
        return self.prompt.text + self.answer

    def row(self, place: int) -> Attribution:
        """The attribution of one token of the answer to what stands before it.

        Args:
            place: of the token in the answer, negative from its end.

        Raises:
            IndexError: there is no such token.
            TypeError: a place that is no whole number.
        """
        given, place = place, whole_number(place)
        if isinstance(place, bool) or not isinstance(place, int):
            raise TypeError(f"place must be a whole number, got {given!r:.80}")
        if not -len(self) <= place < len(self):
            raise IndexError(f"place must be in {-len(self)}..{len(self) - 1}, got {place}")
        place %= len(self)
        first, shift = len(self.prompt), len(self.prompt.text)
        end = max((stop for _, stop in self.offsets[:place]), default=0)
        return dataclasses.replace(
            self.prompt,
            text=self.prompt.text + self.answer[:end],
            tokens=self.prompt.tokens + self.tokens[:place],
            token_ids=self.prompt.token_ids + self.prompt.target.token_ids[:place],
            offsets=self.prompt.offsets + tuple((shift + a, shift + b) for a, b in self.offsets[:place]),
            scores=self.scores[place, : first + place].clone(),
            special=self.prompt.special + self.special[:place],
            template=self.prompt.template + (False,) * place if self.prompt.template else (),
            target=self.targets[place],
            next_tokens=self.next_tokens[place],
            segments={**self.prompt.segments, **({"answer so far": (shift, shift + end)} if end else {})},
        )

    # -- sums over parts

    def to_table(self, rows: Unit = "word", columns: Unit = "word") -> AnswerTable:
        """Scores summed over parts of the answer and parts of what stands before it.

        Tokens are divided among parts as in :class:`gim.Attribution`; those set aside, special ones and a chat
        template's own, are in no word, sentence or segment.

        Args:
            rows: ``"token"``, ``"word"``, ``"sentence"`` or ``"segment"``, the whole answer.
            columns: the same; the prompt's segments are its messages by role, or those that were named.

        Raises:
            ValueError: a unit that is none of these.
        """
        first, said = len(self.prompt), alone(self)

        def parts(side: Attribution, scores: torch.Tensor, unit: Unit) -> list[Span]:
            return _UNITS[unit](dataclasses.replace(side, scores=scores))

        for name, unit in (("rows", rows), ("columns", columns)):
            if unit not in _UNITS:
                raise ValueError(f"{name} must be one of {tuple(_UNITS)}, got {unit!r}")
        prompt, answer = parts(self.prompt, self.total[:first], columns), parts(said, self.total[first:], columns)
        across = torch.tensor(
            [
                [one.score for one in [*parts(self.prompt, row[:first], columns), *parts(said, row[first:], columns)]]
                for row in self.scores
            ],
            dtype=torch.float32,
            device="cpu",
        )
        # What the rows add up to: each part of the answer, of every column.
        summed = [[one.score for one in parts(said, column.contiguous(), rows)] for column in across.mT]
        return AnswerTable(
            rows=tuple(parts(said, self.total[first:], rows)),
            prompt=tuple(prompt),
            answer=tuple(answer),
            scores=torch.tensor(summed, dtype=torch.float32, device="cpu").mT.contiguous(),
        )

    # -- other forms

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as :meth:`to_json` writes it."""
        return saved.answer_to_fields(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each token of the answer and each token before it, in order.

        Returns:
            Columns ``answer_position``, ``answer_token``, ``position``, ``part`` (``"prompt"`` or ``"answer"``),
            ``token`` and ``score``.

        Raises:
            ImportError: pandas, which the extra ``evaluate`` installs, is missing.
        """
        first = len(self.prompt)
        tokens = [*self.prompt.tokens, *self.tokens]
        pairs = [(place, position) for place in range(len(self)) for position in range(first + place)]
        return data_frame(
            {
                "answer_position": [place for place, _ in pairs],
                "answer_token": [self.tokens[place] for place, _ in pairs],
                "position": [position for _, position in pairs],
                "part": ["prompt" if position < first else "answer" for _, position in pairs],
                "token": [tokens[position] for _, position in pairs],
                "score": [float(self.scores[place, position]) for place, position in pairs],
            }
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The result as JSON, from which :meth:`from_json` makes an equal one; scores to the last bit.

        Args:
            path: a file to write it to as well, in one step.

        Raises:
            OSError: the file cannot be written.
        """
        return written(saved.to_document(self.to_dict()), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str], *, max_bytes: int = saved.MAX_BYTES) -> AnswerAttribution:
        """The inverse of :meth:`to_json`; arguments and errors as of :meth:`gim.Attribution.from_json`."""
        fields = saved.read_answer(source, max_bytes)
        return cls(prompt=Attribution(**fields.pop("prompt")), **fields)

    # -- to look

    def to_html(self, path: str | os.PathLike[str] | None = None, *, top: int = 20) -> str:
        """One self-contained page that loads nothing: a click on a token of the answer shows what it was made of.

        Args:
            path: a file to write it to as well, in one step.
            top: rows of the table of the strongest tokens.

        Raises:
            OSError: the file cannot be written.
        """
        from gim.report import answers

        return written(answers.page(self, top=top), path)

    def to_png(self, path: str | os.PathLike[str], *, top: int = 15) -> None:
        """Draw the answer, and the prompt with its scores for the whole answer; arguments and errors as of
        :meth:`gim.Attribution.to_png`."""
        from gim.report import answers

        write_atomically(path, answers.png(self, top=top))

    def _repr_html_(self) -> str:
        from gim.report import answers

        return answers.cell(self)

    def __rich__(self) -> RenderableType:
        from gim.report import answers

        return answers.view(self)

    def __repr__(self) -> str:
        strongest = ", ".join(f"{token.token!r} {token.score:+.3g}" for token in self.prompt.top(3))
        return (
            f"AnswerAttribution({self.answer!r:.60}, {len(self)} tokens over {len(self.prompt)}, "
            f"model={self.prompt.model!r}, rules={self.prompt.rules.name}, strongest: {strongest or 'none'})"
        )


def alone(answer: AnswerAttribution) -> Attribution:
    """The answer's own tokens with their scores for the whole answer."""
    return dataclasses.replace(
        answer.prompt,
        text=answer.answer,
        tokens=answer.tokens,
        token_ids=answer.prompt.target.token_ids,
        offsets=answer.offsets,
        special=answer.special,
        template=(),
        scores=answer.total[len(answer.prompt) :].clone(),
        segments={"answer": (0, len(answer.answer))} if answer.answer else {},
    )


def _single_tokens(side: Attribution) -> list[Span]:
    return [
        Span(token, start, end, float(score), (place, place + 1))
        for place, (token, (start, end), score) in enumerate(zip(side.tokens, side.offsets, side.scores, strict=True))
    ]


_UNITS: dict[str, Callable[[Attribution], list[Span]]] = {
    "token": _single_tokens,
    "word": Attribution.to_words,
    "sentence": Attribution.to_sentences,
    "segment": Attribution.to_segments,
}
