"""Indirect objects: "When Mary and John went to the store, John gave a drink to" is continued by " Mary"."""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import NAMES, Candidate, PairCandidate, Tokens

PLACES = ("store", "park", "school", "office", "station", "garden", "hospital", "restaurant")
THINGS = ("drink", "book", "ring", "ball", "letter", "basket", "computer", "snack")
FORMS = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "After {first} and {second} got to the {place}, {giver} decided to give a {thing} to",
    "Then {first} and {second} had a long talk at the {place}, and {giver} gave a {thing} to",
)


def generate(rng: random.Random, tokens: Tokens) -> Candidate:
    """One prompt: the receiver is right, the giver wrong."""
    text, _, right, wrong = generate_pair(rng, tokens)
    return text, right, wrong


def generate_pair(rng: random.Random, _: Tokens) -> PairCandidate:
    """One prompt, and the same with the receiver's name in the place of the giver's: MIB's ``s2_io_flip``."""
    receiver, giver = rng.sample(NAMES, 2)
    first, second = rng.sample((receiver, giver), 2)
    form, place, thing = rng.choice(FORMS), rng.choice(PLACES), rng.choice(THINGS)
    text, other = (
        form.format(first=first, second=second, place=place, giver=one, thing=thing) for one in (giver, receiver)
    )
    return text, other, (f" {receiver}",), (f" {giver}",)
