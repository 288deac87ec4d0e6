"""Which heads speak to which later layers: edge attribution inside ``gim.GIM``.

The score of the edge from head h of layer i to a later reader (the attention or the MLP of a layer, or the end of the
model) is

    sum over tokens and channels of (what h writes, corrupted - clean) * (gradient of the metric at the reader's input)

that is, what the metric would change by, to first order under the rules, if that reader alone saw the corrupted head.
Two forward passes and one backward give every edge. The two prompts must have the same number of tokens.

    python examples/edge_attribution.py [MODEL CLEAN CORRUPTED ANSWER WRONG]

Source: Syed et al. 2023, arXiv 2310.10348 (the scores); Edin et al. 2025, arXiv 2505.17630 (the rules).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import gim
import gim.demo
from gim.parts import anatomy


@contextmanager
def head_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Inside, the heads' outputs ``[1, T, HQ * D]`` of each layer, as they go into the output projection."""
    found: list[torch.Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        for layer in model.model.layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reader_gradients(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, the gradient ``[1, T, H]`` that each reader of the residual stream sends back, once a backward ran.

    Every reader begins with a norm, whose input is the residual stream and whose backward is that reader's alone.
    """
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, norm: nn.Module) -> Any:
        def fork(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            branch = inputs[0].view_as(inputs[0])  # a copy in the graph, which this reader alone reads
            branch.register_hook(lambda grad: found.__setitem__(name, grad))
            return (branch, *inputs[1:])

        return norm.register_forward_pre_hook(fork)

    handles = [watch("end", model.model.norm)]
    for index, layer in enumerate(model.model.layers):
        handles.append(watch(f"attention {index}", layer.input_layernorm))
        handles.append(watch(f"MLP {index}", layer.post_attention_layernorm))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def edges(
    model: Any,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    answer: int,
    wrong: int,
    rules: gim.rules.Rules | str = "GIM",
) -> dict[tuple[int, int, str], float]:
    """The score of every edge, by layer and head of its source and the name of its reader.

    Args:
        model: a Hugging Face decoder with the names of Llama.
        clean, corrupted: token ids ``[1, T]``.
        answer, wrong: the metric is the difference of their logits after the last token.
        rules: rules of the backward.
    """
    if clean.shape != corrupted.shape:
        raise ValueError(f"the prompts must have as many tokens, got {tuple(clean.shape)} and {tuple(corrupted.shape)}")
    layers = model.model.layers
    embedding: Any = anatomy.of(model).embedding
    with torch.no_grad(), head_inputs(model) as corrupted_heads:
        model(corrupted, use_cache=False)
    with gim.GIM(model, rules=rules), head_inputs(model) as clean_heads, reader_gradients(model) as gradients:
        logits = model(clean, use_cache=False).logits[0, -1]
        (logits[answer] - logits[wrong]).backward(inputs=[embedding.weight])
    embedding.weight.grad = None

    scores: dict[tuple[int, int, str], float] = {}
    heads = model.config.num_attention_heads
    for index, (before, after) in enumerate(zip(clean_heads, corrupted_heads, strict=True)):
        change = (after - before.detach()).unflatten(-1, (heads, -1))[0]  # [T, HQ, D]
        weight = layers[index].self_attn.o_proj.weight.detach().unflatten(-1, (heads, -1))  # [H, HQ, D]
        written = torch.einsum("thd,chd->htc", change, weight)  # [HQ, T, H]: what each head adds to the stream
        later = [f"MLP {index}"] + [
            f"{kind} {j}" for j in range(index + 1, len(layers)) for kind in ("attention", "MLP")
        ]
        for reader in [*later, "end"]:
            for head, score in enumerate((written * gradients[reader]).sum((1, 2)).tolist()):
                scores[index, head, reader] = score
    return scores


def main() -> None:
    if len(sys.argv) > 1:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name, *texts = sys.argv[1:]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    else:
        model, tokenizer = gim.demo.load()
        fact = "The password of Irene is {}. The password of Irene is"
        texts = [fact.format("lantern"), fact.format("copper"), " lantern", " copper"]
    clean, corrupted = (tokenizer(text, return_tensors="pt").input_ids for text in texts[:2])
    answer, wrong = (tokenizer.encode(text, add_special_tokens=False)[0] for text in texts[2:])
    found = edges(model, clean, corrupted, answer, wrong)
    for (layer, head, reader), score in sorted(found.items(), key=lambda item: -abs(item[1]))[:10]:
        print(f"{score:+.4f}  head {layer}.{head} -> {reader}")


if __name__ == "__main__":
    main()
