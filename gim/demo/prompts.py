"""Prompts with planted facts and a question at the end, drawn from a seed.

A prompt is running text in which some sentences state a fact, "The password of Irene is lantern.",
and which ends in a question about one of them:

    Question: What is the password of Irene?
    Answer:

Nothing but retrieval answers it, because names and words are paired at random. Pairs and filler
passages are divided once, by a hash of their text, into a training part and a held-out part, so
a held-out prompt contains neither a pair nor a passage that the demo model was trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

Split = Literal["training", "held_out"]

FACT = "The password of {name} is {word}."
QUESTION = "\nQuestion: What is the password of {name}?\nAnswer:"

_NAMES_TEXT = """
Adam Agnes Albert Alfred Alice Anton Beatrice Bertha Boris Bridget Carlos Cecil Clara Conrad
Cyril Daphne Dennis Diana Dora Edgar Elias Emil Ernest Felix Fiona Flora Frieda George Gilbert
Gloria Greta Gustav Hannah Harold Helen Hilda Hugo Ingrid Irene Iris Isaac Ivan Jasper Jonas
Judith Julia Karen Kevin Kirsten Klaus Laura Leonard Linda Lorenz Lucia Mabel Marcus Martha
Miriam Monica Nadia Nathan Nestor Nora Norman Olga Oscar Otto Pablo Paula Petra Philip Quentin
Rachel Ralph Rita Samuel Sarah Simon Sonia Stefan Teresa Thomas Tilda Ulrich Ursula Vera Victor
Vincent Viola Walter Wanda Wendy William Xavier Yvonne
"""

NAMES: tuple[str, ...] = tuple(_NAMES_TEXT.split())

_WORDS_TEXT = """
acorn anchor apricot badger bamboo banjo barley beetle biscuit blanket bonnet bucket buffalo
butter cactus camel candle canyon carrot castle cedar cherry cinnamon clover cobalt coconut
comet compass copper coral cotton cricket crystal cymbal daisy diamond dolphin domino donkey
dragon eagle ember emerald falcon feather fiddle garlic ginger glacier goblet granite hammer
hazel helmet heron honey igloo ivory jacket jasmine jungle kettle ladder lantern lemon lily
lizard lobster magnet maple marble meadow melon mirror mitten monkey mustard needle nutmeg
orchid oyster panda papaya parrot pebble penguin pepper piano pigeon pillow pirate planet plum
poppy puzzle quartz rabbit raven ribbon rocket ruby saddle saffron sandal scarlet shadow silver
spider sponge thunder tiger tulip tunnel turban turnip turtle umbrella vanilla velvet violet
violin wagon walnut walrus whistle willow wizard yogurt zebra
"""

WORDS: tuple[str, ...] = tuple(_WORDS_TEXT.split())

# Of 16 hash values, how many are held out. Most shipped passages are held out because a long
# held-out prompt needs many of them, while training has the licences of the machine besides.
_HELD_OUT_PAIRS = 3
_HELD_OUT_PASSAGES = 12


@dataclass(frozen=True)
class Statement:
    """One sentence of a prompt that states the asked fact.

    Args:
        sentence: first and one-past-last character of the sentence, full stop included.
        word: first and one-past-last character of the stated word, without the space before it.
    """

    sentence: tuple[int, int]
    word: tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A text with facts in it and a question about one of them at its end.

    Args:
        text: the whole prompt; it ends in "Answer:".
        answer: what continues the text when the question is answered, with its leading space.
        name: whose password is asked for.
        statements: where the asked fact is stated, in the order of the text.
        facts: number of different facts in the text, the asked one included.
        split: the part of the pairs and passages that it was drawn from.
    """

    text: str
    answer: str
    name: str
    statements: tuple[Statement, ...]
    facts: int
    split: Split


def pair_split(name: str, word: str) -> Split:
    """Say to which part the pair of a name and a word belongs.

    Args:
        name: the name in the fact.
        word: the word in the fact.

    Returns:
        "held_out" for about a fifth of all pairs, "training" for the others; the same everywhere.
    """
    return "held_out" if _sixteenth(f"{name} {word}") < _HELD_OUT_PAIRS else "training"


def passage_split(passage: str) -> Split:
    """Say to which part a passage of filler text belongs.

    Args:
        passage: the text of the passage, exactly as in the file.

    Returns:
        "held_out" for about three quarters of all passages, "training" for the others.
    """
    return "held_out" if _sixteenth(passage) < _HELD_OUT_PASSAGES else "training"


@cache
def filler(split: Split) -> tuple[str, ...]:
    """Read the shipped filler passages of one part.

    Args:
        split: which part.

    Returns:
        The passages in the order of the file; none of them contains a name or a word of a fact.
    """
    text = resources.files(__package__).joinpath("filler.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and passage_split(line) == split)


def draw_pairs(rng: random.Random, count: int, split: Split) -> list[tuple[str, str]]:
    """Draw facts with different names and different words.

    Args:
        rng: source of randomness; advanced.
        count: number of facts.
        split: the part that every pair belongs to.

    Returns:
        A list of (name, word).

    Raises:
        ValueError: if count is not between 1 and 32.
    """
    if not 1 <= count <= 32:
        raise ValueError(f"a prompt holds 1 to 32 facts, not {count}")
    pairs: list[tuple[str, str]] = []
    used: set[str] = set()
    for name in rng.sample(NAMES, count):
        # 32 of more than 100 words are gone at most, so every name still has partners left.
        words = [word for word in WORDS if word not in used and pair_split(name, word) == split]
        word = rng.choice(words)
        used.add(word)
        pairs.append((name, word))
    return pairs


def make_prompt(
    seed: int | str,
    *,
    facts: int = 8,
    statements: Literal[1, 2] = 1,
    tokens: int | None = None,
    count_tokens: Callable[[str], int] | None = None,
    split: Split = "held_out",
    passages: Sequence[str] | None = None,
) -> Prompt:
    """Make one prompt; the same arguments give the same prompt everywhere.

    Args:
        seed: decides everything that is drawn.
        facts: number of different facts, 1 to 32.
        statements: how often the asked fact is stated; the others are stated once. Two statements
            lie in different thirds of the text if there is filler.
        tokens: least number of tokens of the text, filled up with passages; None for no filler.
        count_tokens: number of tokens of a text, special tokens included; needed with `tokens`.
        split: the part that pairs and passages are drawn from.
        passages: filler passages to draw from instead of the shipped ones; repeated, in another
            order, where a prompt needs more than there are.

    Returns:
        The prompt; with filler it exceeds `tokens` by less than one passage.

    Raises:
        ValueError: if `facts` is out of range, `statements` is neither 1 nor 2, `tokens` comes
            without `count_tokens` or is too small for the facts, or there is no passage to fill up with.
    """
    if statements not in (1, 2):
        raise ValueError(f"the asked fact is stated once or twice, not {statements} times")
    rng = random.Random(f"{split} {seed}")
    pairs = draw_pairs(rng, facts, split)
    asked = pairs[0]
    sentences = [FACT.format(name=name, word=word) for name, word in pairs]
    planted = sentences[:1] * (statements - 1) + sentences
    question = QUESTION.format(name=asked[0])

    if tokens is None:
        text = " ".join(plant(rng, [], planted[statements:], planted[:statements])) + question
    elif count_tokens is None:
        raise ValueError("a length in tokens needs count_tokens")
    else:
        pool = filler(split) if passages is None else tuple(passages)
        if not pool:
            raise ValueError("there is no filler passage to reach the length with")
        room = tokens - count_tokens(" ".join(planted) + question)
        if room < 0:
            raise ValueError(f"tokens must be at least {tokens - room:,} with {facts} facts, got {tokens:,}")
        text = ""
        while not text or count_tokens(text) < tokens:
            pieces = _fill(rng, pool, room, count_tokens)
            text = " ".join(plant(rng, pieces, planted[statements:], planted[:statements])) + question
            # The parts need not add up to the whole, so the next try has some more room.
            room += 1

    word_at = planted[0].rindex(asked[1])
    places = []
    start = text.find(planted[0])
    while start >= 0:
        word = (start + word_at, start + word_at + len(asked[1]))
        places.append(Statement((start, start + len(planted[0])), word))
        start = text.find(planted[0], start + 1)
    return Prompt(text, f" {asked[1]}", asked[0], tuple(places), facts, split)


def plant(rng: random.Random, passages: Sequence[str], once: Sequence[str], spread: Sequence[str]) -> list[str]:
    """Put sentences between passages.

    Args:
        rng: source of randomness; advanced.
        passages: the filler, in order.
        once: sentences that may stand anywhere.
        spread: two sentences to stand in the first and in the last third, or one anywhere.

    Returns:
        Passages and sentences in the order of the text.
    """
    gaps = len(passages)
    third = gaps // 3
    placed = [(rng.uniform(0, gaps), sentence) for sentence in once]
    if len(spread) == 2:
        placed.append((rng.uniform(0, third), spread[0]))
        placed.append((rng.uniform(gaps - third, gaps), spread[1]))
    else:
        placed += [(rng.uniform(0, gaps), sentence) for sentence in spread]
    # A passage stands at the middle of its unit interval; the drawn number orders the sentences
    # that fall into the same gap as well.
    placed += [(index + 0.5, passage) for index, passage in enumerate(passages)]
    if not passages:
        rng.shuffle(placed)
        return [text for _, text in placed]
    return [text for _, text in sorted(placed)]


def _fill(rng: random.Random, pool: Sequence[str], room: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Draw passages that together have at least `room` tokens."""
    special = count_tokens("")
    sizes = {passage: count_tokens(f" {passage}") - special for passage in pool}
    typical = sorted(sizes.values())[len(sizes) // 2]
    chosen: list[str] = []
    unused: list[str] = []
    while room > 0:
        if not unused:
            unused = rng.sample(list(pool), len(pool))
        # Near the end the shortest passage that is long enough, to overshoot by little.
        enough = [passage for passage in unused if sizes[passage] >= room]
        last = room <= typical and enough
        passage = min(enough, key=sizes.__getitem__) if last else unused[-1]
        unused.remove(passage)
        chosen.append(passage)
        room -= sizes[passage]
    rng.shuffle(chosen)
    return chosen


def _sixteenth(text: str) -> int:
    """Hash a text to 0..15, the same on every machine (Python's own hash is salted)."""
    return hashlib.sha256(text.encode("utf-8")).digest()[0] & 15
