"""Captum's LayerGradientXActivation inside ``gim.GIM``: its gradients follow the rules, its code is as it was.

    python examples/captum_layer.py [MODEL PROMPT]

Needs the package captum.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from captum.attr import LayerGradientXActivation

import gim
import gim.demo
from gim.parts import anatomy


def scores(model: Any, ids: torch.Tensor, target: int, rules: gim.rules.Rules | str = "GIM") -> torch.Tensor:
    """Gradient times embedding ``[T]`` of the logit of ``target`` after the last of the tokens ``[1, T]``."""

    def last_logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, use_cache=False).logits[:, -1]

    captum = LayerGradientXActivation(last_logits, anatomy.of(model).embedding)
    with gim.GIM(model, rules=rules):
        found: torch.Tensor = captum.attribute(ids, target=target)
    return found[0].sum(-1).detach()


def main() -> None:
    if len(sys.argv) > 1:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name, text = sys.argv[1:]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    else:
        model, tokenizer = gim.demo.load()
        text = "The password of Irene is lantern. The password of Irene is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        target = int(model(ids).logits[0, -1].argmax())
    for token, score in zip(tokenizer.convert_ids_to_tokens(ids[0]), scores(model, ids, target).tolist(), strict=True):
        print(f"{score:+.4f} {token}")


if __name__ == "__main__":
    main()
