"""The study of facts: its scores are those of the package, its shares are counted right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gim
from benchmarks import facts, facts_tables
from gim.targets import Contrast, Token
from tests.families import text_model, tokenizer


def test_facts_are_many_and_their_subjects_are_where_they_are_said_to_be() -> None:
    asked = facts.facts()
    assert len(asked) >= 200 and len({one.text for one in asked}) == len(asked) and asked == facts.facts()
    assert all(one.text[one.subject[0] : one.subject[1]].strip() and one.answer.startswith(" ") for one in asked)
    japan = next(one for one in asked if one.text == "The capital of Japan is")
    assert (japan.text[slice(*japan.subject)], japan.answer) == ("Japan", " Tokyo")


def test_scores_are_those_of_single_calls() -> None:
    model, made = text_model(torch.float32), tokenizer()
    model.requires_grad_(False)
    text, answer = "The cat sat on the mat", 9
    ids = torch.tensor(made(text).input_ids)
    found = facts.scores(model, made, ids, answer)
    others = model(ids[None]).logits[0, -1].clone()
    others[answer] = -torch.inf
    contrast = Contrast(answer, int(others.argmax()))
    targets = {name: Token(answer, name) for name in ("logit", "logprob", "logodds")} | {"contrast": contrast}
    for preset in facts.PRESETS:
        for measure, target in targets.items():
            for baseline, given in (("default", None), (" the", made.encode(" the", add_special_tokens=False)[0])):
                want = gim.attribute(model, made, text, target=target, rules=preset, baseline=given).scores
                torch.testing.assert_close(
                    found[preset, measure, baseline], want, rtol=1e-4, atol=1e-5 * float(want.abs().max())
                )


def test_hits_shares_and_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = text_model(torch.float32), tokenizer()
    text = "The cat sat"
    ids = made(text).input_ids
    fact = facts.Fact(text, (4, 7), "x")
    monkeypatch.setattr(facts, "LIKELIEST", 321)
    own = torch.zeros(len(ids))
    place = next(
        i for i, (a, b) in enumerate(made(text, return_offsets_mapping=True).offset_mapping) if a < 7 and b > 4
    )
    own[place] = -5.0  # the subject, by absolute score alone
    own[-1] = 4.0
    own[0] = 9.0  # <s>, which is never ranked
    every = {setting[:3]: own for setting in facts.settings()}
    monkeypatch.setattr(facts, "scores", lambda *_: every)
    hits = facts.ask(model, made, fact)
    assert hits is not None and set(map(tuple, hits.values())) == {(True, False)} and len(hits) == len(facts.settings())
    monkeypatch.setattr(facts, "LIKELIEST", 0)
    assert facts.ask(model, made, fact) is None, "a fact that the model does not know"

    first = "GIM_CONSTANT/logprob/default/as it is"
    missed: dict[str, Any] = {name: [False, False] for name in hits}
    right = {**missed, first: [True, True]}
    rows = facts.rows([right, missed, right, right])
    chosen = facts_tables.best(rows, "absolute")
    assert (chosen["rules"], chosen["measure"], chosen["chosen on, absolute"][0]) == ("GIM_CONSTANT", "logprob", 0.5)
    assert chosen["reported, absolute"] == [1.0, 1.0, 1.0]
    told = {"date": "", "device": "", "commit": "", "versions": {}, "not_reached": [], "models": {"m": ""}}
    text = facts_tables.summary({**told, "rows": [{"model": "m", **row} for row in rows]})
    assert "| m | 4 | best of all | GIM_CONSTANT, logprob, space as baseline | 100 % [100, 100] |" in text
    assert "| m | 4 | the default | GIM, logit, space as baseline | 0 % [0, 0] |" in text
    assert facts_tables.summary(None) == ""
