"""Tasks in the box: prompts drawn from a seed, with right and wrong next tokens, on this machine alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gim.evaluation.tasks import agreement, comparison, facts, names, needle, sentiment
from gim.evaluation.tasks.words import Candidate, PairCandidate, Tokens

__all__ = ["PAIRED", "TASKS", "Candidate", "PairCandidate", "Task", "Tokens", "draw", "draw_pairs"]


@dataclass(frozen=True)
class Task:
    """A generator of prompts and where it comes from.

    Args:
        name: of the task.
        asks: what a model must do, in one sentence.
        source: who thought of it.
        licence: of its texts.
        generate: from a source of randomness and a count of tokens of a text to one candidate.
        generate_pair: the same with a second prompt of another answer; None where the task has none.
    """

    name: str
    asks: str
    source: str
    licence: str
    generate: Callable[[random.Random, Tokens], Candidate]
    generate_pair: Callable[[random.Random, Tokens], PairCandidate] | None = None

    def page(self) -> str:
        """What the task asks, where it comes from, and three of its prompts."""
        rng = random.Random(f"{self.name} page")
        drawn = [self.generate(rng, lambda text: len(text.split())) for _ in range(3)]
        lines = [f"{self.name}: {self.asks}", f"Source: {self.source}", f"Licence: {self.licence}", "Examples:"]
        for text, right, wrong in drawn:
            shown = text if len(text) < 400 else f"{text[:160]} [...] {text[-160:]}"
            lines.append(f"  {shown!r} right: {', '.join(map(repr, right))}; wrong: {', '.join(map(repr, wrong))}")
        return "\n".join(lines)


#: Written by hand or by a generator of this package.
OWN = "MIT, as this package, for which its texts were written"

PASSAGES = "MIT, as this package, for which most of its passages were written; the others are the text of CC0 1.0"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "indirect-objects",
            "Of two people, one gives a thing to the other: name the other.",
            "after Wang et al. 2022, arXiv 2211.00593",
            OWN,
            names.generate,
            names.generate_pair,
        ),
        Task(
            "greater-than",
            "An event began in a year: it ended in a later one. Any digit that makes it later is right.",
            "after Hanna et al. 2023, arXiv 2305.00586",
            OWN,
            comparison.generate,
            comparison.generate_pair,
        ),
        Task(
            "agreement",
            "A verb agrees with its subject, past nouns of the other number.",
            "after Linzen et al. 2016, arXiv 1611.01368, and Marvin and Linzen 2018, arXiv 1808.09031",
            OWN,
            agreement.generate,
            agreement.generate_pair,
        ),
        Task(
            "facts",
            "The capital of a country, from memory.",
            "common knowledge; such prompts are those of Petroni et al. 2019, arXiv 1909.01066",
            OWN,
            facts.generate,
        ),
        Task(
            "facts-in-context",
            "A fact that only the passage in front of it states, among others of its kind.",
            "after the recall task of this package's demo model",
            OWN,
            facts.generate_in_context,
        ),
        Task(
            "needle",
            "A fact among passages of 2,048 tokens at least that have nothing to do with it.",
            "after Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack",
            PASSAGES,
            needle.generate,
        ),
        Task(
            "needle-8k",
            "A fact among passages of 8,000 tokens at least that have nothing to do with it.",
            "after Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack",
            PASSAGES,
            needle.generate_long,
        ),
        Task(
            "sentiment",
            "Whether a short review is positive or negative.",
            "reviews put together from phrases that were written for this task",
            OWN,
            sentiment.generate,
        ),
    )
}
#: Tasks whose prompts come in pairs.
PAIRED = tuple(name for name, task in TASKS.items() if task.generate_pair is not None)
#: Candidates in a row that bring nothing new, after which a task has no more.
EXHAUSTED = 2000


def draw(name: str, tokenizer: Any, count: int, seed: int) -> Iterator[Candidate]:
    """Different candidates of a task, each of whose answers is one token of the tokenizer.

    Args:
        name: of a task.
        tokenizer: cuts the answers.
        count: how many, at most.
        seed: decides everything that is drawn.
    """
    for (text,), right, wrong in _drawn(name, TASKS[name].generate, tokenizer, count, seed):
        yield text, right, wrong


def draw_pairs(name: str, tokenizer: Any, count: int, seed: int) -> Iterator[PairCandidate]:
    """Different pairs of a task, both prompts of as many tokens, and each answer one token; arguments as in
    :func:`draw`.

    Raises:
        ValueError: the task's prompts come in no pairs.
    """
    generate = TASKS[name].generate_pair
    if generate is None:
        raise ValueError(f"task {name}: its prompts come in no pairs; those of {', '.join(PAIRED)} do")
    for (text, other), right, wrong in _drawn(name, generate, tokenizer, count, seed):
        yield text, other, right, wrong


def _drawn(
    name: str, generate: Callable[[random.Random, Tokens], Any], tokenizer: Any, count: int, seed: int
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    """What a generator makes: prompts of one length, right and wrong tokens."""
    rng = random.Random(f"{name} {seed}")
    cut: dict[str, bool] = {}

    def is_token(text: str) -> bool:
        if text not in cut:
            cut[text] = len(tokenizer.encode(text, add_special_tokens=False)) == 1
        return cut[text]

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    seen: set[str] = set()
    misses = 0
    while len(seen) < count and misses < EXHAUSTED:
        *texts, right, wrong = generate(rng, tokens)
        right, wrong = tuple(filter(is_token, right)), tuple(filter(is_token, wrong))
        if texts[0] in seen or not right or not wrong or (len(texts) > 1 and len({*map(tokens, texts)}) > 1):
            misses += 1
            continue
        misses = 0
        seen.add(texts[0])
        yield tuple(texts), right, wrong
