"""What an explanation of a few tokens costs beside the model's own passes: calls, which no other work disturbs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gim
from gim.intercept import flow
from tests.oracle import CALLS_A_LAYER, NODES_A_LAYER

FEW, MORE = 2, 6
IDS = torch.arange(10, 26)[None]


def llama(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=36, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def calls(layers: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Calls of Python's and of C's functions in an explanation whose forward is known, and nodes it looks at."""
    model, count, nodes = llama(layers), 0, 0
    gim.explain(model, IDS, baseline_token_id=1)
    describe = flow._describe

    def described(*given: Any) -> Any:
        nonlocal nodes
        nodes += 1
        return describe(*given)

    def counted(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    monkeypatch.setattr(flow, "_describe", described)
    sys.setprofile(counted)
    try:
        gim.explain(model, IDS, baseline_token_id=1)
    finally:
        sys.setprofile(None)
        monkeypatch.undo()
    return count, nodes


def test_a_layer_takes_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    few, more = calls(FEW, monkeypatch), calls(MORE, monkeypatch)
    a_layer, nodes = ((after - before) / (MORE - FEW) for before, after in zip(few, more, strict=True))
    assert a_layer <= CALLS_A_LAYER and nodes <= NODES_A_LAYER, (a_layer, nodes)
