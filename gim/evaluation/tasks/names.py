"""Indirect objects: "When Mary and John went to the store, John gave a drink to" is continued by " Mary"."""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import NAMES, Candidate, Tokens

PLACES = ("store", "park", "school", "office", "station", "garden", "hospital", "restaurant")
THINGS = ("drink", "book", "ring", "ball", "letter", "basket", "computer", "snack")
FORMS = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "After {first} and {second} got to the {place}, {giver} decided to give a {thing} to",
    "Then {first} and {second} had a long talk at the {place}, and {giver} gave a {thing} to",
)


def generate(rng: random.Random, _: Tokens) -> Candidate:
    """One prompt: the receiver is right, the giver wrong."""
    receiver, giver = rng.sample(NAMES, 2)
    first, second = rng.sample((receiver, giver), 2)
    text = rng.choice(FORMS).format(
        first=first, second=second, place=rng.choice(PLACES), giver=giver, thing=rng.choice(THINGS)
    )
    return text, (f" {receiver}",), (f" {giver}",)
