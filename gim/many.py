"""Many prompts: several run together, in one row or padded, each result as if its prompt had run alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gim import answering, scoring
from gim.answers import AnswerAttribution
from gim.asked import Asked
from gim.attribution import Attribution
from gim.layerwise import LayerwiseAttribution
from gim.memory import OutOfMemoryError
from gim.parts import anatomy
from gim.parts.calling import Packing
from gim.scoring import Progress
from gim.single import Single, TargetLike
from gim.targets import Measure

#: Tokens of a batch, padding and all, where its rows are several, and the share of them that is no padding.
BATCH_TOKENS = 2048
LEAST_FULL = 0.8
#: Tokens whose work a document of its own in one row costs. Measured on one core with a model of 135M parameters, as
#: shares of the time of single calls: 16 prompts of 8 to 38 tokens take 0.34 in one row and 0.47 padded, 64 of 7 to 10
#: tokens 0.17 and 0.19, 16 of 7 and 8 tokens 0.20 and 0.21, 5 of 8 to 220 tokens 0.80 and 1.43, 5 of 8 to 900 tokens
#: 1.00 and 1.52. From 500 tokens on a prompt keeps a core busy by itself.
DOCUMENT_TOKENS = 1
#: Logits of a batch: those of every row where any row is explained.
BATCH_LOGITS = 2**26

#: What one prompt may be the cause of, and what says nothing of the model.
OF_A_PROMPT = (ValueError, TypeError, FloatingPointError, OutOfMemoryError)
OF_A_RUN = (FloatingPointError, OutOfMemoryError, MemoryError)

Result = Attribution | LayerwiseAttribution | AnswerAttribution


class PromptError(ValueError):
    """Some prompts of a list could not be attributed; the others were.

    Args:
        results: in the order of the list, None for a prompt that has none.
        errors: why it has none, by its place in the list.
    """

    def __init__(self, results: Sequence[Result | None], errors: Mapping[int, Exception]) -> None:
        places = sorted(errors)
        said = "; ".join(f"prompt[{place}]: {errors[place]}" for place in places[:5])
        more = f"; and {len(places) - 5} more" if len(places) > 5 else ""
        super().__init__(
            f"{len(places)} of {len(results)} prompts could not be attributed ({said}{more}); the others are in the "
            "results of this error"
        )
        self.results = list(results)
        self.errors = dict(errors)


class PromptsInterrupted(KeyboardInterrupt):
    """Ctrl-C came while prompts of a list were attributed.

    Args:
        results: in the order of the list, None for a prompt that was not finished.
    """

    def __init__(self, results: Sequence[Result | None]) -> None:
        super().__init__("the attribution of several prompts was interrupted")
        self.results = list(results)


def is_several(prompt: Any) -> bool:
    """Whether what is given as a prompt is a list of prompts, each text or a chat: not one chat, which has messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str | bytes)
        and any(isinstance(one, Sequence) for one in prompt)
        and not any(isinstance(one, Mapping) for one in prompt)
    )


def attribute(
    ask: Callable[..., Asked],
    prompts: Sequence[Any],
    target: TargetLike | Sequence[TargetLike],
    position: int | None,
    measure: Measure | None,
    answer: Any,
    generate: int | None,
    segments: Any,
    progress: Progress | None,
) -> list[Any]:
    """The attribution of each prompt, in the order of the list; the arguments of :func:`gim.attribute`.

    Args:
        ask: makes a request of a prompt, its ``segments`` and ``progress``.

    Raises:
        PromptError: some prompts have none; an error that all have alike is raised as it is.
        PromptsInterrupted: Ctrl-C.
    """
    count = len(prompts)
    each = [
        {"target": one, "answer": two, "segments": three}
        for one, two, three in zip(
            _each("target", target, count),
            _each("answer", answer, count),
            _each("segments", segments, count),
            strict=True,
        )
    ]
    run = _Run(count, progress)
    singles: dict[int, Single] = {}
    try:
        for place, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            found = None
            with run.kept(place):
                asked = ask(prompt, segments=own["segments"], progress=None)
                if own["answer"] is not None or generate is not None:
                    found = answering.attribute(asked, own["answer"], generate, measure)
                else:
                    singles[place] = Single.of(asked, own["target"], position, measure)
            if found is not None:
                run.done({place: found})  # out of what is kept: an error of progress is no prompt's
        run.together(singles)
    except KeyboardInterrupt as error:
        raise PromptsInterrupted(run.results) from error
    return run.whole()


def _each(name: str, given: Any, count: int) -> Sequence[Any]:
    """What is given for each prompt: a list or an array has one for each, anything else is for all of them.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(given, list | tuple) and not getattr(given, "ndim", 0):
        return [given] * count
    if len(given) != count:
        raise ValueError(
            f"{name} must be one for all, or a list of {count}, one for each prompt (token ids are a list in "
            f"that list, or a Continuation); got a list of {len(given)}"
        )
    return given


class _Run:
    """What has come of the prompts of a list so far."""

    def __init__(self, count: int, progress: Progress | None) -> None:
        self.results: list[Result | None] = [None] * count
        self._errors: dict[int, Exception] = {}
        self._progress = progress
        #: Whether rows of several lengths have been taken together without harm, in one row or padded.
        self._packs = self._pads = True
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            done = sum(one is not None for one in self.results) + len(self._errors)
            self._progress("prompts", done, len(self.results))

    def done(self, found: Mapping[int, Result]) -> None:
        """Results by their places."""
        for place, one in found.items():
            self.results[place] = one
        self._report()

    @contextmanager
    def kept(self, place: int) -> Iterator[None]:
        """Inside, what is wrong with one prompt is kept and does not keep others from their results."""
        try:
            yield
        except OF_A_PROMPT as error:
            self._errors[place] = error
            self._report()

    def together(self, singles: Mapping[int, Single]) -> None:
        """Run prompts, as many at once as belong together."""
        self._together(singles, packs=True)

    def _together(self, singles: Mapping[int, Single], *, packs: bool) -> bool:
        """Run prompts, of those in a batch several lengths in one row where they may be; whether each has a result."""
        every = True
        for ones, packed in self._batches(singles, packs):
            error = self._batch(ones, packed) if len(ones) > 1 else None
            if len(ones) > 1 and error is None:
                continue
            if packed:
                fine, packing = False, _packing(ones)
                packing.refused = str(error)
                try:
                    fine = self._together(ones, packs=False)
                finally:
                    # Where others fail too it was a prompt, and memory may be there another time.
                    packing.refused = packing.refused if fine and not isinstance(error, OF_A_RUN) else ""
                self._packs = self._packs and not fine
            else:
                fine = self._alone(ones)
                self._pads = self._pads and not (fine and len(ones) > 1)  # as of a model that reads padding
            every = every and fine
        return every

    def _alone(self, ones: Mapping[int, Single]) -> bool:
        """Run each by itself; whether each has a result."""
        wrong = len(self._errors)
        for place, one in ones.items():
            found = None
            with self.kept(place):
                found = one.attribution(one.asked.run([one.wanted], one.target.measure))
            if found is not None:
                self.done({place: found})
        return len(self._errors) == wrong

    def _batch(self, ones: Mapping[int, Single], packed: bool) -> Exception | None:
        """Run some together; why that did not work. What is wrong with one shows when each runs alone."""
        # The shortest comes last in a row, where it has most before it and costs least to be run alone.
        places = sorted(ones, reverse=packed, key=list(ones).index)
        several, packing = [ones[place] for place in places], _packing(ones)
        try:
            result = several[0].asked.run([one.wanted for one in several], several[0].target.measure, packed=packed)
            if packed and not packing.proved:
                _prove(several[-1], result)
                packing.proved = True
        except Exception as error:
            if not packed and not isinstance(error, OF_A_PROMPT):
                raise
            return error
        how = "packed in one row" if packed else "as rows of one batch"
        if packing.refused:
            how += f"; not packed, for {packing.refused}"
        result = dataclasses.replace(result, memory=f"{result.memory}; {len(several)} prompts {how}")
        self.done({place: ones[place].attribution(result, row) for row, place in enumerate(places)})
        return None

    def _batches(self, singles: Mapping[int, Single], packs: bool) -> Iterator[tuple[dict[int, Single], bool]]:
        """Prompts by their places, those of one measure from short to long, as many as fit; whether in one row."""
        left = sorted(singles, key=lambda one: (singles[one].target.measure, len(singles[one].wanted.ids), one))
        while left:
            # What comes of one batch decides how the next is made.
            packs = packs and self._packs and not _packing(singles).refused
            count = 1
            while count < len(left) and self._fit([singles[place] for place in left[: count + 1]], packs):
                count += 1
            ones = {place: singles[place] for place in left[:count]}
            yield ones, packs and _is_rather_packed(_lengths(ones.values()))
            left = left[count:]

    def _fit(self, ones: Sequence[Single], packs: bool) -> bool:
        """Whether prompts, from short to long, may run together."""
        lengths, model = _lengths(ones), ones[0].asked.model
        if ones[0].target.measure != ones[-1].target.measure:
            return False
        if packs and _is_rather_packed(lengths):
            tokens, places = sum(lengths), max(len(one.wanted.positions) for one in ones)
        else:
            tokens = len(ones) * lengths[-1]
            places = len({place for one in ones for place in one.wanted.positions})
            if lengths[0] < lengths[-1] and not (self._pads and sum(lengths) >= LEAST_FULL * tokens):
                return False
        logits = len(ones) * places * anatomy.of(model).vocabulary_size
        return tokens <= BATCH_TOKENS and logits <= BATCH_LOGITS

    def whole(self) -> list[Any]:
        """Every result.

        Raises:
            PromptError: not every prompt has one.
        """
        errors = list(self._errors.values())
        if len(errors) == len(self.results) and len({(type(one), str(one)) for one in errors}) == 1:
            raise errors[0]
        if errors:
            raise PromptError(self.results, self._errors) from errors[0]
        return self.results


def _packing(ones: Mapping[int, Single]) -> Packing:
    """What is known of packing for the model of some prompts."""
    return anatomy.of(next(iter(ones.values())).asked.model).packing


def _is_rather_packed(lengths: Sequence[int]) -> bool:
    """Whether lengths, ascending, would take more padding than documents of their own cost, or than is let pass."""
    tokens = len(lengths) * lengths[-1]
    return tokens - sum(lengths) > min(DOCUMENT_TOKENS * len(lengths), (1 - LEAST_FULL) * tokens)


def _lengths(ones: Iterable[Single]) -> list[int]:
    return [len(one.wanted.ids) for one in ones]


def _prove(last: Single, packed: scoring.Result) -> None:
    """Hold the last of several prompts in one row against the prompt alone; leaks and lost positions are no rounding.

    Raises:
        ValueError: they differ.
    """
    alone = last.asked.run([last.wanted], last.target.measure)
    model = last.asked.model
    scores = packed.scores[-1, : len(last.wanted.ids)]
    differs = max(
        float((scores - alone.scores[0]).abs().max() / alone.scores.abs().max().clamp_min(1e-30)),
        float((packed.values[-1] - alone.values[0]).abs() / alone.values[0].abs().clamp_min(1.0)),
    )
    # Half the digits of a number: what rounding leaves after many layers, and more than a document of others does.
    if not differs <= torch.finfo(anatomy.of(model).dtype).eps ** 0.5:
        raise ValueError(f"{type(model).__name__} gives other results for one of several documents than for it alone")
    if len(packed.report.unsupported) > len(alone.report.unsupported):
        raise ValueError(f"not every rule reaches every part of {type(model).__name__} with several documents in a row")
