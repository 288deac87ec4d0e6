"""A needle among passages: one fact somewhere in thousands of tokens, asked for at their end.

The passages are those of the demo prompts: some written for this package, the others the text of CC0 1.0. No name and
no word of a needle is in them.
"""

from __future__ import annotations

import random

from gim.demo.prompts import NAMES, WORDS, filler
from gim.evaluation.tasks.words import Candidate, Tokens

#: Tokens of the prompts, at least; a prompt has one passage more at most.
SHORT, LONG = 2048, 8000


def generate(rng: random.Random, tokens: Tokens) -> Candidate:
    """One prompt of :data:`SHORT` tokens."""
    return _generate(rng, tokens, SHORT)


def generate_long(rng: random.Random, tokens: Tokens) -> Candidate:
    """One prompt of :data:`LONG` tokens."""
    return _generate(rng, tokens, LONG)


def _generate(rng: random.Random, tokens: Tokens, least: int) -> Candidate:
    """Passages in an order of their own, repeated where more are needed, and two needles, one of which is asked for."""
    names, words = rng.sample(NAMES, 2), rng.sample(WORDS, 2)
    needles = [f"The password of {name} is {word}." for name, word in zip(names, words, strict=True)]
    question = f"The password of {names[0]} is"
    passages: list[str] = []
    pool = [*filler("held_out"), *filler("training")]
    room = least - tokens(" ".join([*needles, question]))
    while room > 0:
        for passage in rng.sample(pool, len(pool)):
            if room <= 0:
                break
            passages.append(passage)
            room -= tokens(f" {passage}")
    for needle in needles:
        passages.insert(rng.randrange(len(passages)), needle)
    return f"{' '.join(passages)} {question}", (f" {words[0]}",), (f" {words[1]}",)
