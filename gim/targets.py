"""What is explained: a token, a contrast of two tokens, or a continuation, and under which measure."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Measure = Literal["logit", "logprob", "logodds"]
MEASURES: tuple[Measure, ...] = ("logit", "logprob", "logodds")
#: Each in words.
MEASURE_NAMES: dict[Measure, str] = {"logit": "logit", "logprob": "log-probability", "logodds": "log-odds"}
#: What is looked at inside a model beside the tokens.
Per = Literal["layer", "head"]
PERS: tuple[Per, ...] = ("layer", "head")
#: How many of the likeliest tokens a result tells.
LIKELIEST = 5
TokenLike = int | str
#: Sequences of whole numbers that are never meant as ids.
BYTES = (bytes, bytearray)


def check_text(text: str, argument: str) -> None:
    """Refuse text that no tokenizer can cut: with half a character, as what is not UTF-8 on a command line becomes.

    Raises:
        ValueError: there is one; names ``argument`` and its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{argument} must be text, and {text[error.start]!r} at character {error.start} of it is no character"
        ) from error


def check_measure(measure: str) -> None:
    """Raise a ValueError unless there is a measure of that name."""
    if not isinstance(measure, str) or measure not in MEASURES:
        raise ValueError(f"measure must be one of {MEASURES}, got {measure!r:.80}")


@dataclass(frozen=True)
class Token:
    """The score of one next token.

    Args:
        token: a token id, a string that is one token, or ``None`` for the model's own prediction.
        measure: ``"logit"``; ``"logprob"``, the natural logarithm of the softmax over the vocabulary; or
            ``"logodds"``, the logarithm of p / (1 - p): the logit minus the log-sum-exp of all others, which does not
            saturate where p is near 1.
    """

    token: TokenLike | None = None
    measure: Measure = "logit"

    def __post_init__(self) -> None:
        check_measure(self.measure)


@dataclass(frozen=True)
class Contrast:
    """The score of one next token minus the score of another.

    Args:
        token: the token whose score counts positively; ``None`` for the model's own prediction.
        against: the token whose score is subtracted.
        measure: ``"logit"`` or ``"logprob"``, which give the same difference, or ``"logodds"``.
    """

    token: TokenLike | None
    against: TokenLike
    measure: Measure = "logit"

    def __post_init__(self) -> None:
        check_measure(self.measure)


@dataclass(frozen=True)
class Continuation:
    """The sum of the scores of several next tokens, each given those before it, in one backward.

    Args:
        tokens: the continuation as text or token ids; it is appended to the prompt.
        measure: as of :class:`Token`; ``"logprob"`` gives the log-probability of the whole continuation.
    """

    tokens: str | Sequence[int]
    measure: Measure = "logprob"

    def __post_init__(self) -> None:
        check_measure(self.measure)
        if not isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", tuple(id_list(self.tokens, "tokens of a Continuation")))
        if not self.tokens:
            raise ValueError("tokens of a Continuation must not be empty")


Target = Token | Contrast | Continuation


@dataclass(frozen=True)
class Explained:
    """What was explained, after tokens were looked up and the model has run.

    Args:
        kind: ``"token"``, ``"prediction"``, ``"contrast"``, ``"continuation"`` or ``"answer"``.
        label: in words, for titles.
        token_ids: the ids whose scores count; for a contrast the positive one, then the negative one.
        tokens: those ids decoded, as in :class:`NextToken`.
        positions: the position in the sequence whose output gives each score.
        measure: logit, log-probability or log-odds.
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


@dataclass(frozen=True)
class NextToken:
    """A token, or a class, that the model thinks likely where the explained number is read.

    Args:
        token_id: its id, or the number of the class.
        token: decoded, or the label of the class; the id for a token that says nothing.
        probability: of the softmax over all logits, from 0 to 1.
    """

    token_id: int
    token: str
    probability: float


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
    target = whole_number(target)
    if isinstance(target, bool):
        raise TypeError(f"target must be a token id, text, ids or a Target, got {target!r}")
    if isinstance(target, int):
        return Token(target)
    if isinstance(target, torch.Tensor) and target.dim() != 1:
        raise ValueError(f"target must be one id or a list of ids, got a tensor of shape {tuple(target.shape)}")
    several = target if isinstance(target, str) else whole_numbers(target)
    if several is None:
        raise TypeError(f"target must be a token id, text, ids or a Target, got {type(target).__name__}")
    if not several:
        raise ValueError(f"target must have at least one token, got {target!r}")
    if not isinstance(several, str):
        return Continuation(id_list(several, "target"))
    check_text(several, "target")
    ids = tokenizer.encode(several, add_special_tokens=False)
    return Token(ids[0]) if len(ids) == 1 else Continuation(several)


def whole_number(value: Any) -> Any:
    """An integer of numpy's, or a tensor of integers without dimensions, as Python's; anything else as it is."""
    is_one = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype != torch.bool
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and not is_one):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def counted(name: str, given: Any, least: int = 1, others: str = "") -> int:
    """A whole number of Python's or numpy's that is at least ``least``.

    Raises:
        ValueError: anything else; names it, and in ``others`` what may be given besides.
    """
    found = whole_number(given)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name} must be a whole number >= {least}{others}, got {given!r:.80}")
    return found


def counted_or_none(name: str, given: Any) -> int | None:
    """The same from 1 on, or None."""
    return None if given is None else counted(name, given, 1, " or None")


def whole_numbers(given: Any) -> list[Any] | None:
    """What a list, array or tensor of one dimension has, each as of :func:`whole_number`; None for anything else."""
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, *BYTES))
    return [whole_number(one) for one in given] if is_list or getattr(given, "ndim", None) == 1 else None


def id_list(given: Any, argument: str) -> list[int]:
    """Token ids as Python's integers.

    Raises:
        TypeError: no sequence of integers; names ``argument``.
    """
    ids = whole_numbers(given)
    if ids is None:
        raise TypeError(f"{argument} must be text or a list of token ids, got {given!r:.80}")
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{argument} must be text or a list of token ids, got {one!r:.80} among them")
    return ids


def token_id(token: TokenLike, tokenizer: Any, argument: str) -> int:
    """The id of a token given as id or as text that is exactly one token.

    Raises:
        TypeError: neither an id nor text.
        ValueError: the text is not one token; the message shows how the tokenizer cuts it.
    """
    ids = _cut(token, tokenizer, argument)
    if len(ids) != 1:
        raise ValueError(f"{_several(argument, token, ids, tokenizer)}. Give one of them, or a token id.")
    return ids[0]


def contrast_ids(contrast: Contrast, tokenizer: Any, names: tuple[str, str] = ("target", "against")) -> tuple[Any, int]:
    """The ids of a contrast's two sides; None for the model's own prediction.

    Args:
        contrast: what is given.
        tokenizer: cuts its texts.
        names: what to call the sides in a message.

    Raises:
        TypeError: a side that is neither an id nor text.
        ValueError: a side that is not one token; the message shows how the tokenizer cuts it, and what to do.
    """
    sides = (contrast.token, contrast.against)
    cut = [None if side is None else _cut(side, tokenizer, name) for side, name in zip(sides, names, strict=True)]
    ours, others = cut
    if others is None:
        raise TypeError(f"{names[1]} must be a token id or text, got None")
    if all(ids is None or len(ids) == 1 for ids in cut):
        return (None if ours is None else ours[0]), others[0]
    wrong = "; ".join(
        _several(name, side, ids, tokenizer)
        for name, side, ids in zip(names, sides, cut, strict=True)
        if ids is not None and len(ids) != 1
    )
    advice = "or explain each text by itself, as the target, which may have several tokens."
    if ours is None:
        first = f"give the first of them, {tokenizer.decode(others[:1])!r}, " if others else ""
    else:
        shared = next((n for n, (a, b) in enumerate(zip(ours, others, strict=False)) if a != b), None)
        first = ""
        if shared is not None:
            first = f"give those in which the two first differ, {tokenizer.decode(ours[shared : shared + 1])!r} and "
            first += f"{tokenizer.decode(others[shared : shared + 1])!r}, "
            if shared:
                first += f"with {tokenizer.decode(ours[:shared])!r} at the end of the prompt, "
    raise ValueError(f"{wrong}. A contrast is of two tokens that may come next: {first}{advice}")


def _cut(token: Any, tokenizer: Any, argument: str) -> list[Any]:
    """A token given as id or text as the ids it is."""
    token = whole_number(token)
    if isinstance(token, int):
        return [token]
    if not isinstance(token, str):
        raise TypeError(f"{argument} must be a token id, or text that is one token, got {token!r:.80}")
    check_text(token, argument)
    return [int(one) for one in tokenizer.encode(token, add_special_tokens=False)]


def _several(argument: str, token: Any, ids: Sequence[int], tokenizer: Any) -> str:
    pieces = [tokenizer.decode([one]) for one in ids]
    return f"{argument} must be one token, but {token!r} is {len(ids)}: {pieces}"
