"""The study of measures for whole answers: what it asks, and what it makes of what was found."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from benchmarks import answer_tables, results
from benchmarks.answer_measures import CANDIDATES, TOKENS, Answered, ask, questions, summary, winner, write
from tests.families import text_model, tokenizer


def test_questions_are_many_and_none_comes_twice() -> None:
    asked = questions()
    assert len(asked) >= 100 and len(set(asked)) == len(asked) and asked == questions()


def test_a_question_is_held_against_the_models_own_answers() -> None:
    model, made = text_model(torch.float32), tokenizer()
    found = ask("tiny", model, made, "The cat sat on the mat?")
    assert set(found.found) == set(CANDIDATES) and found.answer
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


def test_the_first_half_chooses_and_the_second_is_reported(tmp_path: Path) -> None:
    def answered(place: int, best: str) -> Answered:
        found = {name: (name == best, name == best, 0.5 + 0.1 * (name == best)) for name in CANDIDATES}
        return Answered("smollm2-135m-instruct", str(place), "yes", "cat", 1.0, found)

    ones = [answered(place, "logodds" if place < 4 else "logit") for place in range(8)]
    assert winner(summary(ones[:4])) == "logodds" and winner(summary(ones[4:])) == "logit"
    found = results.load(write(tmp_path, ones))
    assert found["chosen"] == "logodds"
    reported = {row["measure"]: row for row in found["rows"] if row["part"] == "reported"}
    assert reported["logodds"]["sign"] == [0.0, 0.0, 0.0] and reported["logit"]["first"] == [1.0, 1.0, 1.0]
    assert "| log-odds (chosen) | 4 | 0 % [0, 0] |" in answer_tables.summary(found)
    assert answer_tables.summary(None) == ""
