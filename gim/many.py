"""Many prompts: those alike in length run together, each result as if its prompt had run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gim import answering
from gim.answers import AnswerAttribution
from gim.asked import Asked
from gim.attribution import Attribution
from gim.layerwise import LayerwiseAttribution
from gim.memory import OutOfMemoryError
from gim.parts import anatomy
from gim.scoring import Progress
from gim.single import Single, TargetLike
from gim.targets import Measure

#: Tokens of a batch, padding and all, where its rows are several, and the share of them that is no padding. Measured on
#: one core with a model of 135M parameters: prompts of 8 to 40 tokens take 0.6 of the time of single calls; longer ones
#: keep a core busy by themselves, and padding costs what it does.
BATCH_TOKENS = 2048
LEAST_FULL = 0.8
#: Logits of a batch: those of every row where any row is explained.
BATCH_LOGITS = 2**26

#: What one prompt may be the cause of.
OF_A_PROMPT = (ValueError, TypeError, FloatingPointError, OutOfMemoryError)

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
    """What is given for each prompt: a list has one for each, anything else is for all of them.

    Raises:
        ValueError: a list of another length.
    """
    if not isinstance(given, list | tuple):
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
        #: Whether rows of several lengths have been taken together without harm.
        self._pads = True
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
        """Run prompts, those of about the same length in one batch."""
        for batch in self._batches(singles):
            ones = {place: singles[place] for place in batch}
            if len(ones) > 1 and self._batch(ones):
                continue
            alone = 0
            for place, one in ones.items():
                found = None
                with self.kept(place):
                    found = one.attribution(one.asked.run([one.wanted], one.target.measure))
                if found is not None:
                    self.done({place: found})
                    alone += 1
            if len(ones) > 1 and alone == len(ones):
                self._pads = False  # as of a model that reads padding

    def _batch(self, ones: Mapping[int, Single]) -> bool:
        """Run some together; whether that worked. What is wrong with one shows when each runs alone."""
        first = next(iter(ones.values()))
        try:
            result = first.asked.run([one.wanted for one in ones.values()], first.target.measure)
        except OF_A_PROMPT:
            return False
        self.done({place: one.attribution(result, row) for row, (place, one) in enumerate(ones.items())})
        return True

    def _batches(self, singles: Mapping[int, Single]) -> Iterator[list[int]]:
        """Places, sorted by measure and length, in runs that fit one batch."""

        def length(place: int) -> int:
            return len(singles[place].wanted.ids)

        batch: list[int] = []
        explained: set[int] = set()
        for place in sorted(singles, key=lambda one: (singles[one].target.measure, length(one), one)):
            one = singles[place]
            rows, padded = len(batch) + 1, (len(batch) + 1) * length(place)
            more = explained | set(one.wanted.positions)
            logits = rows * len(more) * anatomy.of(one.asked.model).vocabulary_size
            alike = not batch or (
                singles[batch[0]].target.measure == one.target.measure
                and (self._pads or length(batch[0]) == length(place))
            )
            full = sum(map(length, [*batch, place])) >= LEAST_FULL * padded
            if batch and not (alike and full and padded <= BATCH_TOKENS and logits <= BATCH_LOGITS):
                yield batch
                batch, more = [], set(one.wanted.positions)
            batch.append(place)
            explained = more
        if batch:
            yield batch

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
