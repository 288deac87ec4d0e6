"""What the tasks are made of: a candidate's type, and words that several of them use."""

from __future__ import annotations

from collections.abc import Callable

#: A prompt, right next tokens, wrong next tokens.
Candidate = tuple[str, tuple[str, ...], tuple[str, ...]]
#: A prompt, the same with another answer, right and wrong next tokens after the first.
PairCandidate = tuple[str, str, tuple[str, ...], tuple[str, ...]]
#: Counts the tokens of a text.
Tokens = Callable[[str], int]

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Sarah", "Alice", "David", "Anna", "Paul", "Mark", "Laura", "Kate", "Peter",
    "Lisa", "Jack", "Emma", "Robert", "Helen", "George",
)  # fmt: skip
WORDS = (
    "river", "table", "silver", "garden", "window", "orange", "market", "winter", "bridge", "coffee", "forest",
    "castle", "copper", "summer", "planet", "island", "button", "mirror", "basket", "camera",
)  # fmt: skip
