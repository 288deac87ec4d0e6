"""Facts from memory and from a passage: what a model knows, and what it has just read."""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import NAMES, WORDS, Candidate, Tokens

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna",
    "Portugal": "Lisbon", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin",
    "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Russia": "Moscow",
    "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Cuba": "Havana", "Peru": "Lima", "Canada": "Ottawa",
    "Kenya": "Nairobi", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus",
    "England": "London", "Scotland": "Edinburgh", "Belgium": "Brussels", "Thailand": "Bangkok",
}  # fmt: skip
ASKED = (
    "The capital of {country} is",
    "As every child at our school knows, the capital city of {country} is called",
    "She was born in {country} and still lives in its capital city,",
    "Question: What is the capital of {country}?\nAnswer: The capital of {country} is",
)
#: Statements of a passage.
STATEMENTS = 3


def generate(rng: random.Random, _: Tokens) -> Candidate:
    """One prompt: the country's capital is right, those of nine others wrong."""
    country = rng.choice(tuple(CAPITALS))
    others = rng.sample([city for city in CAPITALS.values() if city != CAPITALS[country]], 9)
    text = rng.choice(ASKED).format(country=country)
    return text, (f" {CAPITALS[country]}",), tuple(f" {city}" for city in others)


def generate_in_context(rng: random.Random, _: Tokens) -> Candidate:
    """One prompt: names and words are paired at random, one of them is asked for; the words of the others are wrong."""
    names, words, asked = rng.sample(NAMES, STATEMENTS), rng.sample(WORDS, STATEMENTS), rng.randrange(STATEMENTS)
    passage = " ".join(f"The password of {name} is {word}." for name, word in zip(names, words, strict=True))
    wrong = tuple(f" {word}" for index, word in enumerate(words) if index != asked)
    return f"{passage} The password of {names[asked]} is", (f" {words[asked]}",), wrong
