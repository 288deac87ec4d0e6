"""Measure how often the demo model answers held-out prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gim.demo.prompts import make_prompt

FACTS = 8


@dataclass(frozen=True)
class Case:
    """One row of the table of recall.

    Args:
        tokens: least number of tokens of each prompt.
        statements: how often the asked fact is stated.
        prompts: number of prompts.
    """

    tokens: int
    statements: Literal[1, 2]
    prompts: int


CASES: tuple[Case, ...] = (
    Case(512, 1, 400),
    Case(512, 2, 400),
    Case(1024, 1, 200),
    Case(1024, 2, 200),
    Case(2048, 1, 200),
    Case(2048, 2, 200),
)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Let a model continue a text by one token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: the prompt.

    Returns:
        The text of the likeliest next token.
    """
    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model(**encoded, use_cache=False, logits_to_keep=1).logits
    return tokenizer.decode(logits[0, -1].argmax())


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cases: tuple[Case, ...] = CASES,
    seed: int = 0,
    done: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Ask held-out questions and count the right answers.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        cases: lengths, statements and numbers of prompts.
        seed: decides the prompts.
        done: called with each finished row.

    Returns:
        What recall.json holds: the seed, the number of facts in a prompt and one row per case
        with the shares of right answers and the shortest and longest prompt in tokens.
    """
    rows = []
    model.eval()
    for case in cases:
        began = time.monotonic()
        right = 0
        lengths = []
        for number in range(case.prompts):
            prompt = make_prompt(
                f"{seed} {case.tokens} {case.statements} {number}",
                facts=FACTS,
                statements=case.statements,
                tokens=case.tokens,
                count_tokens=lambda text: len(tokenizer(text).input_ids),
            )
            lengths.append(len(tokenizer(prompt.text).input_ids))
            right += answers(model, tokenizer, prompt.text) == prompt.answer
        row = dataclasses.asdict(case) | {
            "right": right,
            "recall": round(right / case.prompts, 4),
            "shortest": min(lengths),
            "longest": max(lengths),
            "seconds": round(time.monotonic() - began, 1),
        }
        rows.append(row)
        if done is not None:
            done(row)
    return {"seed": seed, "facts": FACTS, "split": "held_out", "rows": rows}
