"""Sentiment: a short review, put together from phrases that were written for this task."""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import Candidate, Tokens

POSITIVE = (
    "a wonderful film with brilliant acting", "a delightful and moving story", "an excellent movie that I loved",
    "a great picture, funny and warm", "a beautiful film with a superb cast", "a charming and clever comedy",
    "a joy from the first scene to the last", "the best thing I have seen in years",
)  # fmt: skip
NEGATIVE = (
    "a terrible film with awful acting", "a boring and pointless story", "a dreadful movie that I hated",
    "a bad picture, dull and cold", "an ugly film with a weak cast", "a stupid and lazy comedy",
    "a bore from the first scene to the last", "the worst thing I have seen in years",
)  # fmt: skip
NEUTRAL = (
    "It is set in a small town.", "It runs for two hours.", "We saw it on a Sunday.", "The cast is from France.",
    "It came out last year.", "The plot is about a family.", "Two brothers wrote it.", "It was filmed by the sea.",
)  # fmt: skip


def generate(rng: random.Random, _: Tokens) -> Candidate:
    """One prompt: a phrase with a feeling and a sentence without, in either order."""
    positive = rng.random() < 0.5
    parts = [rng.choice(NEUTRAL), f"This is {rng.choice(POSITIVE if positive else NEGATIVE)}."]
    rng.shuffle(parts)
    right, wrong = (" positive", " negative") if positive else (" negative", " positive")
    return f"Review: {' '.join(parts)}\nSentiment:", (right,), (wrong,)
