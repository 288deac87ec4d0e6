"""What is asked of a model, checked and as tokens, and the result that is made of what came of it."""

from __future__ import annotations

import importlib.metadata
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import nn

from gim import prompts
from gim import targets as target_kinds
from gim.attribution import Attribution
from gim.inputs import check_ids, check_length, check_room, check_segments, check_token_id, infer_baseline
from gim.memory import MemoryPlan, run
from gim.parts import anatomy
from gim.rules import Rules
from gim.rules import get as get_rules
from gim.scoring import Progress, Result, Terms
from gim.segments import Range
from gim.targets import PERS, Explained, Measure, NextToken, Per, TokenLike
from gim_kernels import engines
from gim_kernels.types import Engine


@dataclass(frozen=True)
class Wanted:
    """What is explained of one row.

    Args:
        ids: of the row.
        positions, targets, signs: of each term, as in :class:`gim.scoring.Terms`.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int]
    signs: Sequence[int]


@dataclass(frozen=True)
class Asked:
    """A prompt as tokens, and how its attribution is to be computed; all but the prompt as in :func:`gim.attribute`.

    Args:
        text, ids, offsets, template, segments: as in :class:`gim.prompts.Encoded`.
        per: None for the tokens alone.
        baseline: id of the token that stands for "nothing".
    """

    model: nn.Module
    tokenizer: Any
    text: str
    ids: list[int]
    offsets: list[Range]
    template: list[bool]
    segments: dict[str, Range]
    baseline: int
    rules: Rules
    memory: MemoryPlan | str
    progress: Progress | None
    allow_extrapolation: bool
    strict: bool
    engine: Engine
    per: Per | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        prompt: Any,
        *,
        baseline: TokenLike | None,
        rules: Rules | str,
        memory: MemoryPlan | str,
        progress: Progress | None,
        allow_extrapolation: bool,
        strict: bool,
        engine: Engine,
        segments: Any,
        template_arguments: Mapping[str, Any] | None,
        per: Literal["token", "layer", "head"] = "token",
    ) -> Asked:
        """The arguments of :func:`gim.attribute` of the same names, checked."""
        engines.check_name(engine)
        if not isinstance(per, str) or per not in ("token", *PERS):
            raise ValueError(f"per must be one of {('token', *PERS)}, got {per!r:.80}")
        chosen = get_rules(rules)
        encoded = prompts.encode(prompt, tokenizer, template_arguments)
        named = encoded.segments if segments is None else check_segments(segments, len(encoded.text))
        baseline_id = (
            infer_baseline(tokenizer) if baseline is None else target_kinds.token_id(baseline, tokenizer, "baseline")
        )
        check_token_id(model, "baseline", baseline_id)
        return cls(
            *(model, tokenizer, encoded.text, encoded.ids, encoded.offsets, encoded.template, named, baseline_id),
            *(chosen, memory, progress, allow_extrapolation, strict, engine, None if per == "token" else per),
        )

    def run(
        self, wanted: Sequence[Wanted], measure: Measure, total: Measure | None = None, *, packed: bool = False
    ) -> Result:
        """Scores of rows that begin with a prompt each, for the terms of :class:`gim.scoring.Terms`.

        A shorter row is padded behind its end, or all are ``packed`` in one. A row of fewer terms has terms that count
        0.
        """
        length, terms = max(len(one.ids) for one in wanted), max(len(one.targets) for one in wanted)
        ids = torch.zeros(len(wanted), length, dtype=torch.int64, device="cpu")
        mask = torch.zeros(len(wanted), length, dtype=torch.bool, device="cpu")
        positions, targets, signs = torch.zeros(3, len(wanted), terms, dtype=torch.int64, device="cpu")
        for row, one in enumerate(wanted):
            ids[row, : len(one.ids)] = torch.tensor(one.ids, device="cpu")
            mask[row, : len(one.ids)] = True
            positions[row] = one.positions[0]
            for rows, given in ((positions, one.positions), (targets, one.targets), (signs, one.signs)):
                rows[row, : len(given)] = torch.tensor(given, device="cpu")
        checked, exists = check_ids(self.model, ids, mask)
        check_length(self.model, checked, exists, self.allow_extrapolation)
        device = checked.device
        scored = Terms(positions.to(device), targets.to(device), signs.to(device), measure, total)
        return run(
            *(self.model, checked, exists, scored, self.baseline, self.rules, self.memory, self.progress),
            strict=self.strict,
            engine=self.engine,
            per=self.per,
            packed=packed,
        )

    def words(self, ids: Sequence[int], result: Result) -> tuple[str, ...]:
        """What the head's outputs stand for: tokens, or classes."""
        parts = anatomy.of(self.model)
        if not result.of_rows:
            return tuple(map(self._alone, ids))
        labels: Any = getattr(parts.config, "id2label", None) or {}
        return tuple(str(labels.get(one, one)) for one in ids)

    def likeliest(self, result: Result, row: int = 0) -> tuple[NextToken, ...]:
        """The likeliest tokens of one row of a result; of an answer's, its own token last where it is none of them."""
        ids: list[int] = list(dict.fromkeys(result.likeliest[row].tolist()))
        return tuple(map(NextToken, ids, self.words(ids, result), result.probabilities[row].tolist()))

    def displayed(self, text: str, ids: Sequence[int], offsets: Sequence[Range]) -> tuple[str, ...]:
        """The tokens of a text as they are shown."""
        special = set(self.tokenizer.all_special_ids)
        return tuple(
            text[start:end] if end > start and one not in special else self._alone(one)
            for one, (start, end) in zip(ids, offsets, strict=True)
        )

    def _alone(self, one: int) -> str:
        """What a token says by itself; its id for one that says nothing, as one that the tokenizer does not have."""
        return self.tokenizer.decode([one]) or f"\u27e8{one}\u27e9"

    def special(self, text: str, ids: Sequence[int], offsets: Sequence[Range]) -> tuple[bool, ...]:
        """Whether each token of a text is a special one, and does not stand for a word that the tokenizer does not
        know."""
        special, unknown = set(self.tokenizer.all_special_ids), self.tokenizer.unk_token_id
        return tuple(
            one in special and not (one == unknown and text[start:end] not in ("", str(self.tokenizer.unk_token)))
            for one, (start, end) in zip(ids, offsets, strict=True)
        )

    def attribution(
        self,
        text: str,
        ids: Sequence[int],
        offsets: Sequence[Range],
        scores: torch.Tensor,
        target: Explained,
        result: Result,
        row: int = 0,
    ) -> Attribution:
        """The result for tokens that begin with the prompt's; its likeliest tokens are those of a row."""
        return Attribution(
            text=text,
            tokens=self.displayed(text, ids, offsets),
            token_ids=tuple(ids),
            offsets=tuple(offsets),
            scores=scores.float().cpu(),
            special=self.special(text, ids, offsets),
            target=target,
            rules=self.rules,
            engine=result.report.engine,
            report=result.report,
            model=_model_name(self.model),
            baseline=(self.baseline, self.tokenizer.decode([self.baseline])),
            versions=_versions(),
            memory=result.memory,
            # What follows the prompt is nobody's template.
            template=tuple(self.template) + (False,) * (len(ids) - len(self.template)),
            segments=self.segments,
            next_tokens=self.likeliest(result, row),
        )


#: What decoders make of bytes that are no character, or not yet.
_REPLACEMENT = "\ufffd"
#: Tokens after which what they say is settled: a character has at most four bytes.
_SETTLED_AFTER = 16


def tokens_of(asked: Asked, argument: str, given: str | Sequence[int]) -> tuple[str, list[int], list[Range]]:
    """Several tokens that follow a prompt: their text, checked ids, and the offsets of each in the text.

    Raises:
        ValueError: none, more than the model has positions, or ids out of range; names ``argument``.
    """
    if isinstance(given, str):
        target_kinds.check_text(given, argument)
        ids, spans = _encoded(given, asked.tokenizer)
    else:
        ids = list(given)
    if not ids:
        raise ValueError(f"{argument} must have at least one token, got {given!r}, which has none")
    for one in ids:
        check_token_id(asked.model, argument, one)
    check_room(asked.model, len(asked.ids), asked.allow_extrapolation, argument, len(ids))
    if isinstance(given, str):
        return given, ids, spans
    text, spans = decoded(ids, asked.tokenizer)
    return text, ids, spans


def _encoded(text: str, tokenizer: Any) -> tuple[list[int], list[Range]]:
    """The tokens of a text without special ones around it, and the range of each."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def decoded(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[Range]]:
    """The text of ids, and the range of each in it: the tokenizer's own where it cuts the text into these ids."""
    text: str = tokenizer.decode(ids)
    usual, spans = _encoded(text, tokenizer)
    if usual != list(ids):
        # Few tokens change what those long before them say, but a stray byte may, so then all are decoded each time.
        spans = _ranges(text, ids, tokenizer, nearby=True) or _ranges(text, ids, tokenizer, nearby=False) or []
    return text, spans


def _ranges(text: str, ids: Sequence[int], tokenizer: Any, *, nearby: bool) -> list[Range] | None:
    """The range of each token, by what it adds to the text of those before it.

    Args:
        nearby: decode each token after a few others only; None comes of it where that does not make the text.
    """
    spans: list[Range] = []
    # Tokens decoded together; those before `settled` say the `before` first characters, which end at `at` in the text.
    window: list[int] = []
    settled = before = at = start = 0
    said = ""
    for one in ids:
        longer = tokenizer.decode([*window, one])
        # Twice, for a space that comes first says nothing to some decoders.
        if longer == said and not tokenizer.decode([one, one]):
            spans.append((start, start))
            continue
        window.append(one)
        said = longer
        shown = said[before:]
        same = sum(takewhile(bool, map(operator.eq, shown, text[at : at + len(shown)])))
        # A character of which not all bytes are there is the whole character's place.
        end = max(start, min(at + same + (shown[same : same + 1] == _REPLACEMENT), len(text)))
        # Several bytes that come to nothing may be one replacement.
        spans.append((start - (start == end and text[start - 1 : start] == _REPLACEMENT), end))
        start = max(start, at + same)
        if 0 < same == len(shown):
            at += same
            if nearby:
                del window[:settled]
                said = tokenizer.decode(window)
            settled, before = len(window), len(said)
        elif nearby and len(window) > settled + _SETTLED_AFTER:
            return None
    return None if nearby and at < len(text) else spans


def _model_name(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or getattr(model, "name_or_path", "")
    # A path on somebody's disk is nobody's business in a report; its last part names the model well enough.
    return f"{type(model).__name__}" + (f" ({str(name).rstrip('/').rsplit('/', 1)[-1]})" if name else "")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gim-kernels", "torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
