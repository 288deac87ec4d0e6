"""Is the subject of a fact the strongest token? `python -m benchmarks.facts --models DIR`, or `make facts`.

Short statements that a model completes rightly are explained under every preset, measure and baseline. The question is
how often the strongest token that is ranked has a character of the statement's subject: of the absolute scores, and of
the positive ones alone; once as a result ranks tokens, and once with the first token, on which attention rests where it
finds nothing, compared with itself, so that its score is 0. A fact counts where the answer is among the ten likeliest
tokens. Facts are drawn in halves: the setting that is best on one is reported on the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import results
from benchmarks.answer_measures import CANDIDATES, RESAMPLES, gradients
from benchmarks.faithfulness import MODELS, load
from benchmarks.jobs import Jobs
from gim.evaluation.tasks.facts import CAPITALS
from gim.inputs import infer_baseline

PRESETS = ("GIM", "GIM_CONSTANT", "ATTNLRP", "TRANSFORMER_LRP", "GRADIENT")
#: What every token is compared with: a token's text, the default, or no baseline at all.
BASELINES = ("default", " the", ".", " something", "\n", "none")
#: Whether the first token is compared with itself.
FIRST = ("as it is", "itself")
#: The answer is among this many of the likeliest tokens.
LIKELIEST = 10
SEED = 0

#: Statements with their subject in braces, by relation; each pair is a subject and the answer.
_RELATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "The capital of {} is": tuple(CAPITALS.items()),
    "The official language of {} is": (
        ("Brazil", "Portuguese"), ("Mexico", "Spanish"), ("Iran", "Persian"), ("France", "French"),
        ("Italy", "Italian"), ("Japan", "Japanese"), ("China", "Mandarin"), ("Russia", "Russian"),
        ("Germany", "German"), ("Egypt", "Arabic"), ("Argentina", "Spanish"), ("Portugal", "Portuguese"),
        ("Greece", "Greek"), ("Turkey", "Turkish"), ("Poland", "Polish"), ("Sweden", "Swedish"), ("Denmark", "Danish"),
        ("Israel", "Hebrew"), ("Austria", "German"), ("Cuba", "Spanish"), ("Hungary", "Hungarian"),
        ("Thailand", "Thai"), ("Australia", "English"), ("Vietnam", "Vietnamese"),
    ),
    "{} is a city in": (
        ("Paris", "France"), ("Rome", "Italy"), ("Tokyo", "Japan"), ("Munich", "Germany"), ("Barcelona", "Spain"),
        ("Moscow", "Russia"), ("Cairo", "Egypt"), ("Athens", "Greece"), ("Vienna", "Austria"), ("Shanghai", "China"),
        ("Mumbai", "India"), ("Toronto", "Canada"), ("Sydney", "Australia"), ("Nairobi", "Kenya"),
        ("Istanbul", "Turkey"), ("Dublin", "Ireland"), ("Lisbon", "Portugal"), ("Warsaw", "Poland"),
        ("Stockholm", "Sweden"), ("Oslo", "Norway"),
    ),
    "{} is a country on the continent of": (
        ("France", "Europe"), ("Kenya", "Africa"), ("Japan", "Asia"), ("Egypt", "Africa"), ("Germany", "Europe"),
        ("China", "Asia"), ("Nigeria", "Africa"), ("Italy", "Europe"), ("India", "Asia"), ("Brazil", "South"),
        ("Peru", "South"), ("Canada", "North"), ("Ghana", "Africa"), ("Thailand", "Asia"), ("Spain", "Europe"),
    ),
    "The opposite of {} is": (
        ("hot", "cold"), ("up", "down"), ("black", "white"), ("good", "bad"), ("big", "small"), ("day", "night"),
        ("left", "right"), ("happy", "sad"), ("rich", "poor"), ("love", "hate"), ("war", "peace"), ("light", "dark"),
        ("fast", "slow"), ("hard", "soft"), ("true", "false"), ("positive", "negative"),
    ),
    "The color of {} is": (
        ("grass", "green"), ("blood", "red"), ("snow", "white"), ("the sky", "blue"), ("coal", "black"),
        ("milk", "white"), ("a banana", "yellow"), ("the sun", "yellow"), ("chocolate", "brown"),
        ("a ripe tomato", "red"),
    ),
    "The chemical symbol for {} is": (
        ("gold", "Au"), ("silver", "Ag"), ("iron", "Fe"), ("oxygen", "O"), ("hydrogen", "H"), ("carbon", "C"),
        ("sodium", "Na"), ("helium", "He"), ("nitrogen", "N"), ("lead", "Pb"),
    ),
    "The day after {} is": (
        ("Monday", "Tuesday"), ("Tuesday", "Wednesday"), ("Wednesday", "Thursday"), ("Thursday", "Friday"),
        ("Friday", "Saturday"), ("Saturday", "Sunday"), ("Sunday", "Monday"),
    ),
    "The month after {} is": (
        ("January", "February"), ("February", "March"), ("March", "April"), ("April", "May"), ("May", "June"),
        ("June", "July"), ("July", "August"), ("August", "September"), ("September", "October"),
        ("October", "November"), ("November", "December"),
    ),
    "A baby {} is called a": (
        ("dog", "puppy"), ("cat", "kitten"), ("cow", "calf"), ("sheep", "lamb"), ("bear", "cub"), ("lion", "cub"),
        ("horse", "foal"), ("goat", "kid"),
    ),
    "The currency of {} is the": (
        ("Japan", "yen"), ("India", "rupee"), ("Russia", "ruble"), ("Mexico", "peso"), ("China", "yuan"),
        ("Germany", "euro"), ("France", "euro"), ("the United States", "dollar"), ("the United Kingdom", "pound"),
        ("Canada", "Canadian"), ("Switzerland", "Swiss"), ("Brazil", "real"),
    ),
    "{} was written by": (
        ("Romeo and Juliet", "William"), ("Hamlet", "William"), ("Pride and Prejudice", "Jane"), ("1984", "George"),
        ("The Great Gatsby", "F"), ("Harry Potter", "J"), ("War and Peace", "Leo"), ("Frankenstein", "Mary"),
        ("Moby Dick", "Herman"), ("Macbeth", "William"), ("The Odyssey", "Homer"), ("Don Quixote", "Miguel"),
    ),
    "{} is located in the city of": (
        ("The Eiffel Tower", "Paris"), ("The Colosseum", "Rome"), ("Big Ben", "London"), ("The Kremlin", "Moscow"),
        ("The Louvre", "Paris"), ("Times Square", "New"), ("The Acropolis", "Athens"), ("Red Square", "Moscow"),
        ("Buckingham Palace", "London"), ("The Golden Gate Bridge", "San"), ("The Brandenburg Gate", "Berlin"),
    ),
    "The plural of {} is": (
        ("mouse", "mice"), ("child", "children"), ("man", "men"), ("foot", "feet"), ("tooth", "teeth"),
        ("goose", "geese"),
    ),
    "The past tense of {} is": (
        ("go", "went"), ("eat", "ate"), ("run", "ran"), ("see", "saw"), ("take", "took"), ("write", "wrote"),
    ),
    "{} was founded by": (
        ("Microsoft", "Bill"), ("Apple", "Steve"), ("Amazon", "Jeff"), ("Facebook", "Mark"), ("Tesla", "El"),
        ("Google", "Larry"),
    ),
    "{} was born in": (
        ("William Shakespeare", "Strat"), ("Wolfgang Amadeus Mozart", "Sal"), ("Napoleon Bonaparte", "Cors"),
        ("Albert Einstein", "Ulm"), ("Abraham Lincoln", "Kentucky"), ("Mahatma Gandhi", "Gujarat"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A statement without its answer.

    Args:
        text: the statement.
        subject: first and one-past-last character of its subject.
        answer: how it goes on.
    """

    text: str
    subject: tuple[int, int]
    answer: str


def facts() -> list[Fact]:
    """All facts, in an order that is the same everywhere."""
    found = [
        Fact(statement.format(subject), (at := statement.index("{}"), at + len(subject)), f" {answer}")
        for statement, pairs in _RELATIONS.items()
        for subject, answer in pairs
    ]
    order = numpy.random.default_rng(SEED).permutation(len(found))
    return [found[place] for place in order]


def settings() -> list[tuple[str, str, str, str]]:
    """Every preset, measure, baseline, and what the first token is compared with."""
    return [
        (preset, measure, baseline, first)
        for preset in PRESETS
        for measure in CANDIDATES
        for baseline in BASELINES
        for first in FIRST
    ]


def scores(model: Any, tokenizer: Any, ids: torch.Tensor, answer: int) -> dict[tuple[str, str, str], torch.Tensor]:
    """Of each preset, measure and baseline the scores ``[T]``: one forward a preset, one backward a measure.

    A baseline changes what an embedding is compared with and no gradient.
    """
    table = model.get_input_embeddings()
    embedded = table(ids).detach()
    compared: dict[str, torch.Tensor] = {"none": torch.zeros_like(embedded[0])}
    for name in BASELINES[:-1]:
        one = infer_baseline(tokenizer) if name == "default" else tokenizer.encode(name, add_special_tokens=False)[0]
        compared[name] = table(torch.tensor([one])).detach()
    found = {}
    for preset in PRESETS:
        for measure, grad in gradients(model, preset, embedded, [answer]).items():
            for baseline, other in compared.items():
                found[preset, measure, baseline] = ((embedded - other) * grad).sum(-1)
    return found


def ask(model: Any, tokenizer: Any, fact: Fact) -> dict[str, Any] | None:
    """Whether the subject is first under every setting, by absolute and by positive scores; None for a fact that the
    model does not know or the tokenizer splits."""
    encoded = tokenizer(fact.text, return_offsets_mapping=True)
    ids, answer = torch.tensor(encoded["input_ids"]), tokenizer.encode(fact.answer, add_special_tokens=False)[0]
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, -1]
    if int((logits > logits[answer]).sum()) >= LIKELIEST:
        return None
    special = set(tokenizer.all_special_ids)
    ranked = torch.tensor([one not in special for one in ids.tolist()])
    start, end = fact.subject
    subject = torch.tensor([a < end and start < b for a, b in encoded["offset_mapping"]])
    found: dict[str, Any] = {}
    for (preset, measure, baseline), one in scores(model, tokenizer, ids, answer).items():
        for first in FIRST:
            own = one.clone()
            if first == "itself":
                own[0] = 0.0
            hits = [bool(subject[kind.masked_fill(~ranked, -torch.inf).argmax()]) for kind in (own.abs(), own)]
            found[f"{preset}/{measure}/{baseline}/{first}"] = hits
    return found


def rows(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every setting the share of facts whose subject is first, on each half, with 95 % intervals by resampling."""
    half = len(asked) // 2
    rng = numpy.random.default_rng(SEED)
    table = []
    for preset, measure, baseline, first in settings():
        row: dict[str, Any] = {"rules": preset, "measure": measure, "baseline": baseline, "first": first}
        for part, ones in (("chosen on", asked[:half]), ("reported", asked[half:])):
            hits = numpy.array([one[f"{preset}/{measure}/{baseline}/{first}"] for one in ones], dtype=float)
            drawn = rng.integers(len(hits), size=(RESAMPLES, len(hits)))
            for name, column in zip(("absolute", "positive"), hits.T, strict=True):
                low, high = numpy.quantile(column[drawn].mean(1), [0.025, 0.975])
                row[f"{part}, {name}"] = [round(float(x), 4) for x in (column.mean(), low, high)]
        table.append({"facts": len(asked), **row})
    return table


def main(arguments: list[str] | None = None) -> int:
    """Ask both models every fact; write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.facts", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder that holds the models' folders")
    parser.add_argument("--json", type=Path, default=Path(results.__file__).parent / "results", help="for the results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, help="facts asked of each model; all of them where it is left out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    wanted = facts()[: options.limit]
    jobs = Jobs(
        options.json,
        "facts",
        list(MODELS),
        {"seed": SEED, "likeliest": LIKELIEST, "asked": len(wanted), "models": MODELS},
    )
    for name in MODELS:
        if name in jobs.read()["jobs"]:
            continue
        model, tokenizer = load(options.models / name)
        model.requires_grad_(False)
        known = []
        for place, fact in enumerate(wanted, start=1):
            one = ask(model, tokenizer, fact)
            known += [] if one is None else [one]
            sys.stderr.write(f"{name} {place} of {len(wanted)}, {len(known)} known\n")
        jobs.add(name, [{"model": name, **row} for row in rows(known)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
