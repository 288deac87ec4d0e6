"""Attributions of the demo model find both statements of the asked fact."""

from __future__ import annotations

import dataclasses

import pytest

import gim
import gim.demo
from benchmarks import statements
from gim.demo import make_prompt


@pytest.mark.slow
def test_gim_finds_both_statements_in_nine_prompts_of_ten() -> None:
    model, tokenizer = gim.demo.load()
    counted = statements.count(model, tokenizer, "GIM")
    assert counted["prompts"] == 50
    assert counted["answered"] >= 0.95 * 50
    assert counted["found"] >= 0.9 * 50


def test_a_statement_that_is_not_among_the_top_tokens_is_not_found() -> None:
    model, tokenizer = gim.demo.load()
    prompt = make_prompt("found", facts=4, statements=2)
    result = gim.attribute(model, tokenizer, prompt.text)
    assert statements.both_statements_found(result, prompt)
    hidden = dataclasses.replace(result, scores=result.scores.clone())
    start, end = prompt.statements[0].word
    for position, (first, last) in enumerate(result.offsets):
        if first < end and last > start:
            hidden.scores[position] = 0.0
    assert not statements.both_statements_found(hidden, prompt)


@pytest.mark.parametrize("rules", ["GIM", "GIM_CONSTANT"])
def test_the_demo_prompt_shows_where_its_answer_came_from(rules: str) -> None:
    model, tokenizer = gim.demo.load()
    prompt = gim.demo.prompt()
    result = gim.attribute(model, tokenizer, prompt.text, rules=rules)
    assert len(result.tokens) >= 2048
    assert result.target.tokens[0].strip() == prompt.answer.strip()
    assert len(prompt.statements) == 2
    for statement in prompt.statements:
        assert result.best_in(*statement.sentence, by="abs").rank <= statements.TOP
