"""Under which measure to explain a whole answer: `python -m benchmarks.answer_measures --models DIR --state FILE`.

Short questions are put to real models, which answer greedily. The yardstick is what happens to the answer's
log-probability when one token of the question is replaced, by each of three others in turn. Each measure's sum over the
answer is explained by several presets of rules, and asked: is the sign of the most important token right, does it come
first, and how do its ranks correlate with the yardstick's? What is best on one half of the questions is reported on the
other. So is how far the yardstick agrees with itself: how often one replacement names the token that the other two do.
What is finished is kept in the state's file, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy import stats

import gim
from benchmarks import results
from benchmarks.faithfulness import MODELS, load
from benchmarks.measure import commit, device_name
from gim.answering import generated
from gim.asked import Asked
from gim.evaluation import fingerprint
from gim.inputs import infer_baseline
from gim.targets import MEASURES

#: What a token of the question is replaced by, in turn.
REPLACEMENTS = (" ", " the", " something")
TOKENS = 12
SEED = 0
RESAMPLES = 10_000
PRESETS = ("GIM", "GIM_CONSTANT", "ATTNLRP", "GRADIENT")
#: What a whole answer's number can be: a sum over its tokens of a measure, or of logits minus the likeliest other's.
CANDIDATES = (*MEASURES, "contrast")
SETTINGS = tuple(product(PRESETS, CANDIDATES))

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
    """One question: by ``"rules/measure"`` whether the sign is right, whether the strongest token is first, and the
    correlation; of each replacement whether it names the strongest token that the others name together."""

    model: str
    question: str
    answer: str
    token: str
    effect: float
    found: dict[str, tuple[bool, bool, float]]
    alike: list[bool]


def numbers(logits: torch.Tensor, answer: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is explained, of logits ``[A, V]``: each candidate's sum over the answer's tokens ``[A]``."""
    at = torch.tensor(answer, device=logits.device)[:, None]
    own, others = logits.gather(-1, at)[:, 0], logits.scatter(-1, at, -torch.inf)
    yield "logit", own.sum()
    yield "logprob", logits.log_softmax(-1).gather(-1, at).sum()
    yield "logodds", (own - others.logsumexp(-1)).sum()
    yield "contrast", (own - others.max(-1).values).sum()


def gradients(model: Any, rules: str, embedded: torch.Tensor, answer: Sequence[int]) -> dict[str, torch.Tensor]:
    """Of each candidate the gradient of embeddings, both ``[T, d]``, by a preset's rules, from one forward. The last
    positions say the answer."""
    leaf = embedded.detach().requires_grad_(True)
    with gim.GIM(model, rules=rules):
        logits = model(inputs_embeds=leaf[None], use_cache=False, logits_to_keep=len(answer)).logits[0]
        return {
            name: torch.autograd.grad(number, leaf, retain_graph=True)[0] for name, number in numbers(logits, answer)
        }


def strongest(effects: torch.Tensor) -> int:
    """Where the largest effect of all is, whatever its sign."""
    return int(effects.abs().argmax())


def ask(name: str, model: Any, tokenizer: Any, question: str) -> Answered:
    """Put one question and hold the settings against the yardstick."""
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
    start = asked.text.index(question)
    places = [i for i, (a, b) in enumerate(asked.offsets) if a < start + len(question) and start < b]
    ids = torch.tensor([*asked.ids, *answer[:-1]])

    @torch.no_grad()
    def said(rows: torch.Tensor) -> torch.Tensor:
        at = torch.tensor(answer).expand(len(rows), -1)[..., None]
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=len(answer)).logits
        return torch.as_tensor(logits).float().log_softmax(-1).gather(-1, at).sum((1, 2))

    changes = torch.zeros(len(REPLACEMENTS), len(places))
    for row, text in zip(changes, REPLACEMENTS, strict=True):
        rows = ids.repeat(len(places), 1)
        rows[range(len(places)), places] = tokenizer.encode(text, add_special_tokens=False)[0]
        row[:] = said(ids[None]) - said(rows)
    effects = changes.mean(0)
    first = strongest(effects)

    table, found = model.get_input_embeddings(), {}
    embedded, baseline = table(ids).detach(), table(torch.tensor([infer_baseline(tokenizer)])).detach()
    for rules in PRESETS:
        for measure, grad in gradients(model, rules, embedded, answer).items():
            scores = ((embedded - baseline) * grad).sum(-1)[places]
            found[f"{rules}/{measure}"] = (
                bool(scores[first].sign() == effects[first].sign()),
                strongest(scores) == first,
                float(stats.spearmanr(scores, effects).statistic),
            )
    return Answered(
        name, question, tokenizer.decode(answer), tokenizer.decode([asked.ids[places[first]]]), float(effects[first]),
        found,
        [strongest(own) == strongest(changes.sum(0) - own) for own in changes],
    )  # fmt: skip


def summary(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """Of each setting the three means, each with its 95 % interval by resampling questions."""
    rng = numpy.random.default_rng(SEED)
    drawn = rng.integers(len(answered), size=(RESAMPLES, len(answered)))

    def interval(column: numpy.ndarray[Any, Any]) -> list[float]:
        return [round(float(x), 4) for x in (column.mean(), *numpy.quantile(column[drawn].mean(1), [0.025, 0.975]))]

    rows: list[dict[str, Any]] = []
    for rules, measure in SETTINGS:
        columns = numpy.array([[float(x) for x in one.found[f"{rules}/{measure}"]] for one in answered])
        named = zip(("sign", "first", "spearman"), map(interval, columns.T), strict=True)
        rows.append({"rules": rules, "measure": measure, **dict(named)})
    alike = interval(numpy.array([numpy.mean(one.alike) for one in answered]))
    return [*rows, {"rules": "yardstick", "measure": "another replacement", "first": alike}]


def best(rows: Sequence[dict[str, Any]], rules: str) -> str:
    """The measure under a preset's rules whose sign is right and whose strongest token comes first most often."""
    own = [row for row in rows if row["rules"] == rules]
    return str(max(own, key=lambda row: (row["sign"][0] + row["first"][0], row["spearman"][0]))["measure"])


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
        "chosen": {rules: best(summary(chosen_on), rules) for rules in PRESETS},
        "rows": [
            {"part": part, "questions": len(ones), **row} for part, ones in parts.items() for row in summary(ones)
        ],
    }
    path = folder / results.default_name(found)
    results.save(path, found)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
