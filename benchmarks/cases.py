"""What is timed: every case declared once, with its sizes and its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DecoderCase:
    """A Llama configuration with random weights, and a prompt length.

    Args:
        name: of the configuration.
        layers, hidden, inner, heads, kv_heads, vocabulary: its sizes.
        tokens: prompt length T.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def parameters_in_layers(self) -> int:
        """Weights that a token passes on its way, head and embedding not counted."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def flops(self) -> float:
        """Floating-point operations of one attribution: the least that any implementation does.

        Linear layers: forward and the gradient of the input (weights are frozen), 2 operations for each weight, token
        and product. Attention: 2 products forward and 5 backward on half of the T x T scores.
        """
        linear = 2 * 2 * self.parameters_in_layers * self.tokens
        attention = self.layers * 7 * 2 * self.heads * self.head_size * self.tokens**2 / 2
        return float(linear + attention)

    def eager_bytes(self) -> int:
        """Memory that eager GIM needs at its peak, in bytes, from below: two T x T matrices kept for each layer."""
        return self.layers * 2 * self.heads * self.tokens**2 * 4

    def build(self) -> tuple[Any, torch.Tensor]:
        """The model in float32, in evaluation mode, and the ids ``[1, T]``; the same every time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(2048, self.tokens),
        )
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        return model, torch.randint(0, self.vocabulary, (1, self.tokens))


def small_decoder(tokens: int) -> DecoderCase:
    """The configuration of the CPU suite: 8 layers, hidden 512, 8 query and 2 key heads."""
    return DecoderCase("llama-8x512", 8, 512, 1408, 8, 2, 4096, tokens)


#: Prompt lengths of the suite ``explain`` on a CPU.
EXPLAIN_TOKENS = (1024, 2048, 4096, 8192)
