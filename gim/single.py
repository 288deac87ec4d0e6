"""One explained number of one prompt: what is asked of the model, and what is made of its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gim import targets as target_kinds
from gim.asked import Asked, Wanted, tokens_of
from gim.attribution import Attribution
from gim.inputs import check_head, check_target
from gim.layerwise import LayerwiseAttribution
from gim.parts import anatomy
from gim.scoring import PREDICTION, Result
from gim.segments import Range
from gim.targets import Continuation, Contrast, Explained, Measure, Target, TokenLike

#: What a caller may give as a target.
TargetLike = Target | TokenLike | Sequence[int] | None


@dataclass(frozen=True)
class Single:
    """A prompt and the number of it that is explained.

    Args:
        asked: the prompt.
        text, offsets: of the row that the model reads; a continuation's own tokens but the last are part of it.
        wanted: of that row.
        target: what is explained, its measure filled in.
    """

    asked: Asked
    text: str
    offsets: tuple[Range, ...]
    wanted: Wanted
    target: Target

    @classmethod
    def of(cls, asked: Asked, target: TargetLike, position: int | None, measure: Measure | None) -> Single:
        """The arguments of :func:`gim.attribute` of the same names, checked."""
        model, tokenizer = asked.model, asked.tokenizer
        ids, offsets, text = [*asked.ids], [*asked.offsets], asked.text
        check_head(model)
        head = anatomy.of(model).head
        chosen = target_kinds.parse(_class_number(model, target) if head == "class" else target, tokenizer)
        if measure is not None:
            chosen = dataclasses.replace(chosen, measure=measure)
        if head == "class" and isinstance(chosen, Continuation):
            raise ValueError(f"target must be a class by number or label, got {target!r:.80}")
        last = _position(model, tokenizer, ids, position)
        if isinstance(chosen, Continuation):
            added, targets, spans = tokens_of(asked, "target", chosen.tokens)
            if head != "next token" or last != len(ids) - 1:
                pieces = [tokenizer.decode([one]) for one in targets]
                raise ValueError(
                    f"target must be one {head} at a position inside the prompt, got {chosen.tokens!r}, which is "
                    f"{len(targets)} tokens: {pieces}"
                )
            # The last token is said and not read.
            spans = spans[:-1]
            added = added[: max((end for _, end in spans), default=0)]
            ids += targets[:-1]
            offsets += [(len(text) + start, len(text) + end) for start, end in spans]
            text += added
            signs, positions = [1] * len(targets), list(range(last, last + len(targets)))
        elif isinstance(chosen, Contrast):
            sides = (chosen.token, chosen.against) if head == "class" else target_kinds.contrast_ids(chosen, tokenizer)
            targets = [
                _target_id(model, name, side, tokenizer)
                for name, side in zip(("target", "against"), sides, strict=True)
            ]
            signs, positions = [1, -1], [last, last]
        else:
            targets, signs, positions = [_target_id(model, "target", chosen.token, tokenizer)], [1], [last]
        return cls(asked, text, tuple(offsets), Wanted(ids, positions, targets, signs), chosen)

    def attribution(self, result: Result, row: int = 0) -> Attribution | LayerwiseAttribution:
        """What a row of a result says of it; with the inside of the model where that was asked for."""
        tokens = self._tokens(result, row)
        if self.asked.per is None or result.inside is None:
            return tokens
        inside = result.inside[row].float().cpu()
        if self.asked.per == "layer":
            inside = inside[:, : len(tokens)]
        names = tuple(name for name, _ in anatomy.of(self.asked.model).layers)
        return LayerwiseAttribution(tokens, self.asked.per, inside.contiguous(), names)

    def _tokens(self, result: Result, row: int) -> Attribution:
        count = len(self.wanted.targets)
        found = [int(one) for one in result.token_ids[row, :count]]
        explained = _explained(
            self.target, found, list(self.wanted.positions), float(result.values[row]), self.asked.tokenizer,
            self.asked.words(found, result),
        )  # fmt: skip
        scores = result.scores[row, : len(self.wanted.ids)]
        return self.asked.attribution(self.text, self.wanted.ids, self.offsets, scores, explained, result, row)


def _target_id(model: nn.Module, argument: str, token: TokenLike | None, tokenizer: Any) -> int:
    """The checked id of a target token; :data:`PREDICTION` for None."""
    if token is None:
        return PREDICTION
    if anatomy.of(model).head == "class":
        found = target_kinds.whole_number(_class_number(model, token))
        if not isinstance(found, int):
            raise ValueError(f"{argument} must be a class by number or label, got {token!r}")
    else:
        found = target_kinds.token_id(token, tokenizer, argument)
    check_target(model, argument, found)
    return found


def _class_number(model: nn.Module, target: Any) -> Any:
    """A class by number or label as its number; anything else as it is."""
    if not isinstance(target, str):
        return target
    labels: Any = getattr(anatomy.of(model).config, "label2id", None) or {}
    if target not in labels:
        raise ValueError(f"target must be one of the model's classes {sorted(labels)}, got {target!r}")
    return int(labels[target])


def _position(model: nn.Module, tokenizer: Any, ids: list[int], position: int | None) -> int:
    """The index of the token whose output is explained."""
    if position is not None:
        position = target_kinds.whole_number(position)
        if isinstance(position, bool) or not isinstance(position, int):
            raise TypeError(f"position must be an integer, got {type(position).__name__}")
        if not -len(ids) <= position < len(ids):
            raise ValueError(f"position must be in {-len(ids)}..{len(ids) - 1}, got {position}")
        return position % len(ids)
    if anatomy.of(model).head != "masked token":
        return len(ids) - 1
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"position must be given: {type(model).__name__} fills in a token of its prompt, and the tokenizer has no "
            "mask token to say which"
        )
    masks = [index for index, one in enumerate(ids) if one == tokenizer.mask_token_id]
    if len(masks) != 1:
        raise ValueError(
            f"prompt must hold one {tokenizer.mask_token!r} for a masked language model, got {len(masks)}: give "
            "position"
        )
    return masks[0]


def _explained(
    target: Target, ids: list[int], positions: list[int], value: float, tokenizer: Any, tokens: tuple[str, ...]
) -> Explained:
    if isinstance(target, Continuation):
        kind, label = "continuation", repr(tokenizer.decode(ids) or "".join(tokens))
    elif isinstance(target, Contrast):
        kind, label = "contrast", f"{tokens[0]!r} minus {tokens[1]!r}"
    else:
        kind = "prediction" if target.token is None else "token"
        label = repr(tokens[0])
    return Explained(kind, label, tuple(ids), tokens, tuple(positions), target.measure, value)
