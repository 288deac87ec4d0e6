"""The study of measures for whole answers: what it asks, and what it makes of what was found."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import pytest
import torch

import gim
from benchmarks import answer_tables, results
from benchmarks.answer_measures import (
    CANDIDATES,
    PRESETS,
    SETTINGS,
    TOKENS,
    Answered,
    ask,
    best,
    gradients,
    numbers,
    questions,
    summary,
    write,
)
from benchmarks.faithfulness import MODELS
from gim.inputs import infer_baseline
from gim.targets import MEASURES
from tests.families import text_model, tokenizer
from tests.first import first


def test_questions_are_many_and_none_comes_twice() -> None:
    asked = questions()
    assert len(asked) >= 100 and len(set(asked)) == len(asked) and asked == questions()


def test_a_question_is_held_against_the_models_own_answers() -> None:
    model, made = text_model(torch.float32), tokenizer()
    found = ask("tiny", model, made, "The cat sat on the mat?")
    assert set(found.found) == {"/".join(one) for one in SETTINGS} and found.answer and len(found.alike) == 3
    # The yardstick by hand, for the token that it names.
    prompt = made("Question: The cat sat on the mat?\nAnswer:").input_ids
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    said_ids = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0]
    answer = list(takewhile(lambda one: "\n" not in made.decode([one]), said_ids[len(prompt) :].tolist()))
    assert made.decode(answer) == found.answer

    def said(ids: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        return float(logits[range(len(answer)), answer].sum())

    effects = []
    for place in [i for i, one in enumerate(prompt) if made.decode([one]) == found.token]:
        others = [made.encode(text, add_special_tokens=False)[0] for text in (" ", " the", " something")]
        changed = [said([*prompt[:place], other, *prompt[place + 1 :]]) for other in others]
        effects.append(said(prompt) - sum(changed) / 3)
    assert any(effect == pytest.approx(found.effect, abs=1e-4) for effect in effects)
    assert Answered(**json.loads(json.dumps(asdict(found)))).effect == found.effect


@pytest.mark.parametrize("rules", first(PRESETS, ("GIM",)))
def test_the_gradients_are_those_of_an_answers_attribution(rules: str) -> None:
    model, made, prompt, answer = text_model(torch.float64), tokenizer(), "The cat sat on the mat", [5, 9, 7]
    table = model.get_input_embeddings()
    ids = torch.tensor([*made(prompt).input_ids, *answer[:-1]])
    baseline = table(torch.tensor([infer_baseline(made)]))
    found = gradients(model, rules, table(ids), answer)
    assert set(found) == set(CANDIDATES)
    for measure in MEASURES:
        want = gim.attribute(model, made, prompt, answer=answer, rules=rules, measure=measure).scores.sum(0)
        scores = ((table(ids) - baseline) * found[measure]).sum(-1)
        torch.testing.assert_close(scores.detach().float(), want[: len(ids)])  # results keep float32


def test_numbers_of_an_answer_are_sums_over_its_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.5], [2.0, 0.0, -1.0]], dtype=torch.float64)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    own = torch.stack([p[0, 0], p[1, 2]])
    want = {
        "logit": 1.0 - 1.0, "logprob": own.log().sum(), "logodds": (own / (1 - own)).log().sum(),
        "contrast": (1.0 - 3.0) + (-1.0 - 2.0),
    }  # fmt: skip
    found = dict(numbers(logits, [0, 2]))
    assert {name: float(one) for name, one in found.items()} == pytest.approx({k: float(v) for k, v in want.items()})


def test_the_first_half_chooses_and_the_second_is_reported(tmp_path: Path) -> None:
    def answered(place: int, right: str) -> Answered:
        found = {
            f"{rules}/{name}": (name == right, name == right, 0.5 + 0.1 * (name == right)) for rules, name in SETTINGS
        }
        model = list(MODELS)[place % len(MODELS)]
        return Answered(model, str(place), "yes", "cat", 1.0, found, [True, True, False, False])

    ones = [answered(place, "logodds" if place < 4 else "logit") for place in range(8)]
    assert best(summary(ones[:4]), "GIM") == "logodds" and best(summary(ones[4:]), "GIM") == "logit"
    found = results.load(write(tmp_path, ones))
    assert found["chosen"] == dict.fromkeys(PRESETS, "logodds")
    reported = {row["measure"]: row for row in found["rows"] if row["part"] == "reported"}
    assert reported["logodds"]["sign"] == [0.0, 0.0, 0.0] and reported["logit"]["first"] == [1.0, 1.0, 1.0]
    text = answer_tables.summary(found)
    assert text.startswith("4 questions.")
    zero = " | ".join(["0 % [0, 0]"] * 4)
    assert f"| log-odds (best on the other half) | GIM | {zero} | 0.50 [0.50, 0.50] |" in text
    assert "| another replacement | yardstick |  | 50 % [50, 50] | 50 % [50, 50] | 50 % [50, 50] |  |" in text
    assert "| log-odds (best on the other half) | GRADIENT |" in text and "| logits | GRADIENT |" not in text
    assert answer_tables.summary(None) == ""
