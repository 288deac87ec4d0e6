"""Tiny random models of each family: a row of data each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97

#: Sizes that every family shares; weights are large enough that softmax and gates are far from linear.
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}

#: For each family: what makes the model, and how many norms one of its layers has.
FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SHARED)), 2),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SHARED)), 2),
    "qwen2-window": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**SHARED, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
        2,
    ),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=16)), 4),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SHARED, sliding_window=7)), 2),
}


def make(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of a family in evaluation mode, with norm weights that are not all 1."""
    torch.manual_seed(seed)
    model = FAMILIES[family][0]()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model.to(dtype).eval()


def ids(batch: int = 2, length: int = 37, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[B, T]``."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> Any:
    """A fast byte-level BPE tokenizer, trained here on one sentence, that puts ``<s>`` in front; 320 ids."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["The cat sat on the mat and the cat ate the rat."] * 4, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def text_model(dtype: torch.dtype = torch.float64) -> Any:
    """A Llama for :func:`tokenizer`."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHARED, "vocab_size": 320})).to(dtype).eval()
