"""How often an attribution finds both statements of the asked fact in the demo model's prompts."""

from __future__ import annotations

from typing import Any

import gim
import gim.demo
from gim.demo import make_prompt

#: The words of both statements must be among this many tokens, special tokens not counted.
TOP = 5
PROMPTS = 50
TOKENS = 512


def both_statements_found(result: gim.Attribution, prompt: gim.demo.Prompt, top: int = TOP) -> bool:
    """Whether the word that each statement gives is among the ``top`` tokens with the largest absolute scores."""
    places = [(one.start, one.end) for one in result.top(top)]
    return all(
        any(start < statement.word[1] and end > statement.word[0] for start, end in places)
        for statement in prompt.statements
    )


def count(model: Any, tokenizer: Any, rules: str, prompts: int = PROMPTS, tokens: int = TOKENS) -> dict[str, int]:
    """Over held-out prompts of eight facts, the asked one stated twice: answers that are right, and statements found.

    Args:
        model, tokenizer: of the demo.
        rules: name of a preset.
        prompts: how many.
        tokens: least length of each.
    """
    answered = found = 0
    for seed in range(prompts):
        prompt = make_prompt(
            f"statements-{seed}",
            facts=8,
            statements=2,
            tokens=tokens,
            count_tokens=lambda text: len(tokenizer(text).input_ids),
        )
        result = gim.attribute(model, tokenizer, prompt.text, rules=rules)
        answered += result.target.tokens[0].strip() == prompt.answer.strip()
        found += both_statements_found(result, prompt)
    return {"prompts": prompts, "tokens": tokens, "top": TOP, "answered": answered, "found": found}
