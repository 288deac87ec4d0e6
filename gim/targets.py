"""What is explained: a token, a contrast of two tokens, or a continuation, as a logit or a log-probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Measure = Literal["logit", "logprob"]
MEASURES: tuple[Measure, ...] = ("logit", "logprob")
TokenLike = int | str


def _check_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}, got {measure!r}")


@dataclass(frozen=True)
class Token:
    """The score of one next token.

    Args:
        token: a token id, a string that is one token, or ``None`` for the model's own prediction.
        measure: ``"logit"`` or ``"logprob"`` (natural logarithm of the softmax over the vocabulary).
    """

    token: TokenLike | None = None
    measure: Measure = "logit"

    def __post_init__(self) -> None:
        _check_measure(self.measure)


@dataclass(frozen=True)
class Contrast:
    """The score of one next token minus the score of another.

    Args:
        token: the token whose score counts positively; ``None`` for the model's own prediction.
        against: the token whose score is subtracted.
        measure: ``"logit"`` or ``"logprob"``; the two give the same difference.
    """

    token: TokenLike | None
    against: TokenLike
    measure: Measure = "logit"

    def __post_init__(self) -> None:
        _check_measure(self.measure)


@dataclass(frozen=True)
class Continuation:
    """The sum of the scores of several next tokens, each given those before it, in one backward.

    Args:
        tokens: the continuation as text or token ids; it is appended to the prompt.
        measure: ``"logprob"`` gives the log-probability of the whole continuation.
    """

    tokens: str | Sequence[int]
    measure: Measure = "logprob"

    def __post_init__(self) -> None:
        _check_measure(self.measure)
        if len(self.tokens) == 0:
            raise ValueError("tokens of a Continuation must not be empty")
        if not isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", tuple(int(token) for token in self.tokens))


Target = Token | Contrast | Continuation


@dataclass(frozen=True)
class Explained:
    """What was explained, after tokens were looked up and the model has run.

    Args:
        kind: ``"token"``, ``"prediction"``, ``"contrast"`` or ``"continuation"``.
        label: in words, for titles.
        token_ids: the ids whose scores count; for a contrast the positive one, then the negative one.
        tokens: those ids decoded.
        positions: the position in the sequence whose output gives each score.
        measure: logit or log-probability.
        value: the explained number itself.
    """

    kind: str
    label: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    measure: Measure
    value: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Explained:
        """The inverse of :meth:`to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)


def parse(target: Target | TokenLike | Sequence[int] | None, tokenizer: Any) -> Target:
    """The target that an argument of :func:`gim.attribute` or of the command line means.

    ``None`` is the model's prediction, an integer a token id, a string one token or, where the tokenizer
    cuts it into several, a continuation; a list of ids is a continuation.

    Raises:
        TypeError: anything else.
        ValueError: an empty string or list.
    """
    if isinstance(target, Token | Contrast | Continuation):
        return target
    if target is None:
        return Token()
    if isinstance(target, bool):
        raise TypeError(f"target must be a token id, text, ids or a Target, got {target!r}")
    if isinstance(target, int):
        return Token(target)
    if isinstance(target, str):
        ids = tokenizer.encode(target, add_special_tokens=False)
        return Token(ids[0]) if len(ids) == 1 else Continuation(target)
    if isinstance(target, Sequence | torch.Tensor):
        return Continuation([int(token) for token in target])
    raise TypeError(f"target must be a token id, text, ids or a Target, got {type(target).__name__}")


def token_id(token: TokenLike, tokenizer: Any, argument: str) -> int:
    """The id of a token given as id or as text that is exactly one token.

    Raises:
        ValueError: the text is not one token; the message shows how the tokenizer cuts it.
    """
    if isinstance(token, int):
        return token
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = [tokenizer.decode([one]) for one in ids]
        raise ValueError(
            f"{argument} must be one token, but {token!r} is {len(ids)}: {pieces}. "
            "Give one of them, a token id, or a Continuation."
        )
    return int(ids[0])
