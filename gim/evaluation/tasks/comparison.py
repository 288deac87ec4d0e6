"""Greater-than: "The war lasted from the year 1743 to the year 17" is continued by a digit above 4.

The digit that begins the year's last two is asked for, so a tokenizer must cut numbers into digits. A digit that
equals the first year's is neither right nor wrong: the second digit decides.
"""

from __future__ import annotations

import random

from gim.evaluation.tasks.words import Candidate, PairCandidate, Tokens

EVENTS = ("war", "strike", "project", "expedition", "study", "plague", "siege", "drought")
FORMS = (
    "The {event} lasted from the year {year} to the year {century}",
    "The {event} began in {year} and came to an end in {century}",
)


def generate(rng: random.Random, tokens: Tokens) -> Candidate:
    """One prompt: a later decade is right, an earlier one wrong."""
    text, _, right, wrong = generate_pair(rng, tokens)
    return text, right, wrong


def generate_pair(rng: random.Random, _: Tokens) -> PairCandidate:
    """One prompt, and the same beginning in the century's first year, as in the paper: then every digit is later."""
    century, decade, year = rng.choice((16, 17, 18)), rng.randrange(2, 8), rng.randrange(1, 9)
    form, event = rng.choice(FORMS), rng.choice(EVENTS)
    text, other = (
        form.format(event=event, year=f"{century}{begun}", century=century) for begun in (f"{decade}{year}", "01")
    )
    return text, other, tuple(str(one) for one in range(decade + 1, 10)), tuple(str(one) for one in range(decade))
