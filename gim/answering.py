"""Whole answers: every token of what follows a prompt explained, from one forward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from gim.answers import INTERRUPTED, AnswerAttribution
from gim.asked import Asked, Wanted, tokens_of
from gim.inputs import check_room
from gim.parts import anatomy
from gim.scoring import Result
from gim.segments import Range
from gim.targets import Explained, Measure, check_measure, id_list, whole_number

#: What a whole answer is explained under; benchmarks/answer_measures.py compares.
WHOLE_ANSWER: Measure = "logodds"


class AnswerInterrupted(KeyboardInterrupt):
    """Ctrl-C came while tokens of an answer were explained.

    Args:
        attribution: of the answer's first tokens, those whose rows were finished.
        message: how many they are.
    """

    def __init__(self, attribution: AnswerAttribution, message: str = f"{INTERRUPTED}part of an answer") -> None:
        super().__init__(message)
        self.attribution = attribution


def attribute(
    asked: Asked, answer: str | Sequence[int] | None, generate: int | None, measure: Measure | None
) -> AnswerAttribution:
    """The attribution of an answer that is given or generated.

    Args:
        asked: the prompt.
        answer, generate: as in :func:`gim.attribute`.
        measure: of the single tokens and of the whole; None for logits, and for what serves a whole answer best.
    """
    if answer is not None and generate is not None:
        raise ValueError("answer and generate cannot both be given: one says what the answer is, the other asks for it")
    if measure is not None:
        check_measure(measure)
    anatomy.of(asked.model).call.refuse()
    head = anatomy.of(asked.model).head
    name = "answer" if generate is None else "generate"
    if head != "next token":
        raise ValueError(f"{name} needs a model that says the next token, and {type(asked.model).__name__} says {head}")
    given = generated(asked, generate) if generate is not None else answer
    given = given if isinstance(given, str) else id_list(given, name)
    text, ids, spans = tokens_of(asked, name, given)
    first = len(asked.ids)
    positions = list(range(first - 1, first - 1 + len(ids)))
    single, whole = measure or "logit", measure or WHOLE_ANSWER
    wanted = Wanted([*asked.ids, *ids[:-1]], positions, ids, [1] * len(ids))
    result = asked.run([wanted], single, whole)
    finished = len(result.scores) - 1
    if finished == len(ids):
        return _of(asked, text, ids, spans, result, single, whole)
    told = f"{INTERRUPTED}the first {finished:,} of {len(ids):,} tokens of the answer are explained, and it ends there"
    result.report.notes.append(told)
    text, spans = text[: max(end for _, end in spans[:finished])], spans[:finished]
    raise AnswerInterrupted(_of(asked, text, ids[:finished], spans, result, single, whole), told)


def _of(
    asked: Asked,
    text: str,
    ids: Sequence[int],
    spans: Sequence[Range],
    result: Result,
    single: Measure,
    whole: Measure,
) -> AnswerAttribution:
    """The attribution of an answer's tokens ``ids``, each of which has a row in the result."""
    first = len(asked.ids)
    positions = list(range(first - 1, first - 1 + len(ids)))
    # The last token explains nothing.
    scores = torch.nn.functional.pad(result.scores[:, : first + len(ids) - 1].float().cpu(), (0, 1))
    words = asked.displayed(text, ids, spans)
    values: list[float] = result.values.tolist()
    prompt = asked.attribution(
        asked.text,
        asked.ids,
        asked.offsets,
        scores[-1, :first].clone(),
        Explained("answer", repr(text or "".join(words)), tuple(ids), words, tuple(positions), whole, values[-1]),
        result,
    )
    return AnswerAttribution(
        prompt=prompt,
        answer=text,
        tokens=words,
        offsets=tuple(spans),
        special=asked.special(text, ids, spans),
        scores=scores[:-1].clone(),
        total=scores[-1].clone(),
        targets=tuple(
            Explained("token", repr(word), (one,), (word,), (position,), single, value)
            for word, one, position, value in zip(words, ids, positions, values[:-1], strict=True)
        ),
        next_tokens=tuple(asked.likeliest(result, row) for row in range(len(ids))),
    )


def _goes_on_from_ids(generate: Any) -> bool:
    """Whether a function takes a prompt's ids by the names that transformers has for them, or hands all on."""
    if not callable(generate):
        return False
    taken = inspect.signature(generate).parameters.values()
    named = {one.name for one in taken if one.kind == one.POSITIONAL_OR_KEYWORD}
    return not named or not named.isdisjoint(("inputs", "input_ids"))


def generated(asked: Asked, count: Any) -> list[int]:
    """What the model says next, without the tokens with which it ends."""
    count = whole_number(count)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"generate must be a number of tokens, got {count!r:.80}")
    if count < 1:
        raise ValueError(f"generate must be at least 1 token, got {count}")
    model: Any = asked.model
    check_room(model, len(asked.ids), asked.allow_extrapolation, "generate", count)
    if not _goes_on_from_ids(getattr(model, "generate", None)):
        raise ValueError(
            f"generate needs a model that generates from input_ids, and {type(model).__name__} does not: give answer"
        )
    ids = torch.tensor([asked.ids], device=anatomy.of(model).device)
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = ends.tolist() if isinstance(ends, torch.Tensor) else ends
    ends = {*ends} if isinstance(ends, Sequence) else {ends, asked.tokenizer.eos_token_id}
    padding = getattr(config, "pad_token_id", None)
    # Where a text ends it, it must be cut, and not every model's `generate` takes a tokenizer.
    named = {"tokenizer": asked.tokenizer} if getattr(config, "stop_strings", None) else {}
    with torch.no_grad():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            # Without one of its own transformers says that it takes the end's.
            pad_token_id=min((one for one in ends if one is not None), default=0) if padding is None else padding,
            **named,
        )
    found = getattr(found, "sequences", found)
    ours = found[0].tolist()
    if ours[: len(asked.ids)] != asked.ids:
        raise ValueError(
            f"generate: what {type(model).__name__} generates does not begin with its prompt, so what it says next "
            "cannot be told: give answer"
        )
    new = list(takewhile(lambda one: one not in ends, ours[len(asked.ids) :]))
    if not new:
        raise ValueError("generate: the model ends its answer at once, so there is nothing to explain")
    return new
