"""Under which measure to explain a whole answer: `python -m benchmarks.answer_measures --models DIR --state FILE`.

Short questions are put to real models, which answer greedily. The yardstick is what happens to the answer's
log-probability when one token of the question is replaced, by each of three others in turn. Each measure's sum over the
answer is explained, and asked: is the sign of the most important token right, does it come first, and how do its ranks
correlate with the yardstick's? The measure is chosen on one half of the questions; the other half is what counts.
What is finished is kept in the state's file, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy import stats

from benchmarks import results
from benchmarks.faithfulness import MODELS, load
from benchmarks.measure import commit, device_name
from gim.answering import generated
from gim.asked import Asked, Wanted
from gim.evaluation import fingerprint
from gim.targets import MEASURES, Measure

#: What a token of the question is replaced by, in turn.
REPLACEMENTS = (" ", " the", " something")
TOKENS = 12
SEED = 0
RESAMPLES = 10_000
#: What a whole answer's number can be: a sum over its tokens of a measure, or of logits minus the runner-up's.
CANDIDATES = (*MEASURES, "runner-up")

_COUNTRIES = (
    "France", "Italy", "Japan", "Germany", "Spain", "Russia", "Egypt", "Greece", "England", "Austria", "China", "India",
    "Canada", "Brazil", "Mexico", "Portugal", "Poland", "Sweden", "Norway", "Turkey", "Ireland", "Cuba", "Peru",
    "Kenya",
)  # fmt: skip
_PEOPLE = ("Anna", "Boris", "Clara", "David", "Elena", "Felix")
_CITIES = ("Oslo", "Lima", "Cairo", "Boston")
_COLOURS = (("red", "green"), ("blue", "yellow"), ("black", "white"), ("brown", "pink"))
_THINGS = (("box", "ball"), ("car", "house"), ("hat", "coat"), ("cup", "plate"))
_KNOWN = (
    "What color is the sky?", "What color is grass?", "What color is snow?", "Who wrote Romeo and Juliet?",
    "Who was the first president of the United States?", "What is the largest planet in the solar system?",
    "What is the opposite of hot?", "What is the opposite of big?", "What is the chemical symbol for gold?",
    "How many days are in a week?", "How many months are in a year?", "What is the first letter of the alphabet?",
    "What day comes after Monday?", "What month comes after March?", "Who painted the Mona Lisa?",
    "What do bees make?", "What is a baby dog called?", "What is frozen water called?",
)  # fmt: skip


def questions() -> list[str]:
    """All questions, in an order that is the same everywhere."""
    asked = [f"What is the capital of {country}?" for country in _COUNTRIES]
    asked += [f"What language do people speak in {country}?" for country in _COUNTRIES]
    asked += [f"My name is {who} and I live in {where}. Where do I live?" for who, where in product(_PEOPLE, _CITIES)]
    asked += [
        f"The {one} is {first} and the {other} is {second}. What color is the {other}?"
        for (one, other), (first, second) in product(_THINGS, _COLOURS)
    ]
    asked += _KNOWN
    order = numpy.random.default_rng(SEED).permutation(len(asked))
    return [asked[place] for place in order]


@dataclass(frozen=True)
class Answered:
    """One question: of each candidate whether the sign is right and the strongest token first, and the correlation."""

    model: str
    question: str
    answer: str
    token: str
    effect: float
    found: dict[str, tuple[bool, bool, float]]


def ask(name: str, model: Any, tokenizer: Any, question: str) -> Answered:
    """Put one question and hold the candidates against the yardstick."""
    chat = bool(tokenizer.chat_template)
    prompt: Any = [{"role": "user", "content": question}] if chat else f"Question: {question}\nAnswer:"
    asked = Asked.of(
        model, tokenizer, prompt, baseline=None, rules="GIM", memory="none", progress=None, allow_extrapolation=False,
        strict=True, engine="auto", segments=None, template_arguments=None,
    )  # fmt: skip
    answer = generated(asked, TOKENS)
    if not chat:  # a model that is not made for answers goes on with questions of its own
        line = list(takewhile(lambda one: "\n" not in tokenizer.decode([one]), answer))
        answer = line or answer
    first, start = len(asked.ids), asked.text.index(question)
    places = [i for i, (a, b) in enumerate(asked.offsets) if a < start + len(question) and start < b]
    ids = torch.tensor([*asked.ids, *answer[:-1]])

    @torch.no_grad()
    def logits(rows: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(model(input_ids=rows, use_cache=False).logits)[:, first - 1 :].float()

    def said(rows: torch.Tensor) -> torch.Tensor:
        at = torch.tensor(answer).expand(len(rows), -1)[..., None]
        return logits(rows).log_softmax(-1).gather(-1, at).sum((1, 2))

    effects = torch.zeros(len(places))
    for text in REPLACEMENTS:
        rows = ids.repeat(len(places), 1)
        rows[range(len(places)), places] = tokenizer.encode(text, add_special_tokens=False)[0]
        effects += (said(ids[None]) - said(rows)) / len(REPLACEMENTS)
    strongest = int(effects.abs().argmax())

    likeliest = logits(ids[None])[0].topk(2).indices.tolist()
    others = [second if best == own else best for own, (best, second) in zip(answer, likeliest, strict=True)]
    positions, found = list(range(first - 1, first - 1 + len(answer))), {}
    for candidate in CANDIDATES:
        measure: Measure = "logit" if candidate == "runner-up" else candidate  # type: ignore[assignment]
        against = others if candidate == "runner-up" else []
        signs = [1] * len(answer) + [-1] * len(against)
        at = positions + (positions if against else [])
        wanted = Wanted(ids.tolist(), at, [*answer, *against], signs)
        scores = asked.run([wanted], measure).scores[0, places]
        found[candidate] = (
            bool(scores[strongest].sign() == effects[strongest].sign()),
            int(scores.abs().argmax()) == strongest,
            float(stats.spearmanr(scores, effects).statistic),
        )
    return Answered(
        name, question, tokenizer.decode(answer), tokenizer.decode([asked.ids[places[strongest]]]),
        float(effects[strongest]), found,
    )  # fmt: skip


def summary(answered: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """Of each candidate the three means, each with its 95 % interval by resampling questions."""
    rng = numpy.random.default_rng(SEED)
    drawn = rng.integers(len(answered), size=(RESAMPLES, len(answered)))
    table: dict[str, dict[str, Any]] = {}
    for candidate in CANDIDATES:
        columns = numpy.array([[float(x) for x in one.found[candidate]] for one in answered])
        table[candidate] = {}
        for name, column in zip(("sign", "first", "spearman"), columns.T, strict=True):
            low, high = numpy.quantile(column[drawn].mean(1), [0.025, 0.975])
            table[candidate][name] = [round(float(x), 4) for x in (column.mean(), low, high)]
    return table


def winner(table: dict[str, dict[str, Any]]) -> str:
    """The candidate whose sign is right and whose strongest token comes first most often."""
    return max(CANDIDATES, key=lambda one: (table[one]["sign"][0] + table[one]["first"][0], table[one]["spearman"][0]))


def main(arguments: list[str] | None = None) -> int:
    """Ask what is missing; write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answer_measures", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder that holds the models' folders")
    parser.add_argument("--state", type=Path, required=True, help="file that keeps finished questions")
    parser.add_argument("--json", type=Path, default=Path(results.__file__).parent / "results", help="for the results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=int, help="questions of each model; all of them where it is left out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lines = options.state.read_text().splitlines() if options.state.exists() else []
    done = {(one["model"], one["question"]): Answered(**one) for one in map(json.loads, lines)}
    wanted = questions()[: options.limit]
    for name in MODELS:
        model, tokenizer = load(options.models / name)
        for place, question in enumerate(wanted, start=1):
            if (name, question) not in done:
                done[name, question] = one = ask(name, model, tokenizer, question)
                with options.state.open("a") as file:
                    file.write(json.dumps(asdict(one)) + "\n")
            sys.stderr.write(f"{name} {place} of {len(wanted)}\n")
    write(options.json, [done[name, question] for question in wanted for name in MODELS])
    return 0


def write(folder: Path, answered: list[Answered]) -> Path:
    """The table: the first half of the questions chooses, the second is reported."""
    half = len(answered) // 2
    chosen_on, reported = answered[:half], answered[half:]
    names = list(dict.fromkeys(one.model for one in answered))
    parts = {"chosen on": chosen_on, "reported": reported} | {
        name: [one for one in reported if one.model == name] for name in names
    }
    found: results.Results = {
        "schema": results.SCHEMA,
        "suite": "answers",
        "device": device_name(torch.device("cpu")),
        "versions": fingerprint.versions(),
        "commit": commit(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": None,
        "complete": True,
        "not_reached": [],
        "tokens": TOKENS,
        "replacements": list(REPLACEMENTS),
        "seed": SEED,
        "models": {name: MODELS[name] for name in names},
        "chosen": winner(summary(chosen_on)),
        "rows": [
            {"part": part, "questions": len(ones), "measure": measure, **numbers}
            for part, ones in parts.items()
            for measure, numbers in summary(ones).items()
        ],
    }
    path = folder / results.default_name(found)
    results.save(path, found)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
