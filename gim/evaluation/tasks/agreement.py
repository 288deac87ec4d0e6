"""Subject-verb agreement: "It is clear that the keys near the cabinet behind the house" is continued by " are"."""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import Candidate, PairCandidate, Tokens

SUBJECTS = ("key", "dog", "teacher", "picture", "book", "car", "boy", "manager", "student", "doctor")
NEAR = ("cabinet", "house", "school", "street", "garden", "room")
PREPOSITIONS = ("near", "behind", "next to", "in front of", "in")
LEADS = ("As we could see,", "On that cold day,", "It is clear that", "My friend told me that")


def generate(rng: random.Random, tokens: Tokens) -> Candidate:
    """One prompt: the subject in one number, two nouns between it and its verb in the other."""
    text, _, right, wrong = generate_pair(rng, tokens)
    return text, right, wrong


def generate_pair(rng: random.Random, _: Tokens) -> PairCandidate:
    """One prompt, and the same with its subject in the other number."""
    subject, plural = rng.choice(SUBJECTS), rng.random() < 0.5
    near = rng.sample(NEAR, 2)
    one, other = ("s", "") if plural else ("", "s")
    lead, first, second = rng.choice(LEADS), rng.choice(PREPOSITIONS), rng.choice(PREPOSITIONS)
    text, corrupted = (
        f"{lead} the {subject}{ending} {first} the {near[0]}{other} {second} the {near[1]}{other}"
        for ending in (one, other)
    )
    right, wrong = (" are", " is") if plural else (" is", " are")
    return text, corrupted, (right,), (wrong,)
