"""Subject-verb agreement: "It is clear that the keys near the cabinet behind the house" is continued by " are"."""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import Candidate, Tokens

SUBJECTS = ("key", "dog", "teacher", "picture", "book", "car", "boy", "manager", "student", "doctor")
NEAR = ("cabinet", "house", "school", "street", "garden", "room")
PREPOSITIONS = ("near", "behind", "next to", "in front of", "in")
LEADS = ("As we could see,", "On that cold day,", "It is clear that", "My friend told me that")


def generate(rng: random.Random, _: Tokens) -> Candidate:
    """One prompt: the subject in one number, two nouns between it and its verb in the other."""
    subject, plural = rng.choice(SUBJECTS), rng.random() < 0.5
    near = rng.sample(NEAR, 2)
    one, other = ("s", "") if plural else ("", "s")
    text = (
        f"{rng.choice(LEADS)} the {subject}{one} {rng.choice(PREPOSITIONS)} the {near[0]}{other} "
        f"{rng.choice(PREPOSITIONS)} the {near[1]}{other}"
    )
    return (text, (" are",), (" is",)) if plural else (text, (" is",), (" are",))
