"""Tiny random models of each family: a row of data each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
#: Special tokens inside the vocabulary, for configs whose own are not.
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DROPOUT_OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
#: Grouped products exist for float32 and smaller only; batched ones for every dtype.
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}


@dataclass(frozen=True)
class Family:
    """One family: what makes its model, and how many parts of each kind the model has.

    Args:
        build: makes the model.
        norms: norms of one layer.
        other_norms: norms outside the layers.
        gated: gated MLPs of the whole model; None for one for each layer.
        products: class of each gated MLP and its row of :data:`tests.model_code.PRODUCTS`.
        layers: qualified name of the list of layers.
        attention: name of the attention inside a layer.
    """

    build: Callable[[], Any]
    norms: int = 2
    other_norms: int = 1
    gated: int | None = None
    products: dict[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    attention: str = "self_attn"


def _of(kind: str, *, model: str = "ForCausalLM", **settings: Any) -> Callable[[], Any]:
    """What makes a model of transformers from the shared sizes and settings of its own."""
    return lambda: getattr(hf, f"{kind}{model}")(getattr(hf, f"{kind}Config")(**{**SHARED, **settings}))


#: Decoders. Adding a family is a row here.
FAMILIES: dict[str, Family] = {
    "llama": Family(_of("Llama"), products={"LlamaMLP": "separate"}),
    "qwen2": Family(_of("Qwen2"), products={"Qwen2MLP": "separate"}),
    "qwen2-window": Family(
        _of("Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1), products={"Qwen2MLP": "separate"}
    ),
    "qwen3": Family(_of("Qwen3", head_dim=16), 4, products={"Qwen3MLP": "separate"}),
    "mistral": Family(_of("Mistral", sliding_window=7), products={"MistralMLP": "separate"}),
    "gemma": Family(_of("Gemma", head_dim=16, **SPECIAL), products={"GemmaMLP": "separate"}),
    "gemma2": Family(
        # The sdpa attention of transformers 5.17 leaves the softcap out without a word.
        _of(
            "Gemma2",
            attn_implementation="eager",
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=3.0,
            **SPECIAL,
        ),
        4,
        products={"Gemma2MLP": "separate"},
    ),
    "gemma3": Family(
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(
                **SHARED,
                head_dim=16,
                sliding_window=6,
                query_pre_attn_scalar=16,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                **SPECIAL,
            )
        ),
        6,
        products={"Gemma3MLP": "separate"},
    ),
    "phi3": Family(_of("Phi3", **SPECIAL), products={"Phi3MLP": "fused"}),
    "olmo2": Family(_of("Olmo2", **SPECIAL), 4, products={"Olmo2MLP": "separate"}),
    "granite": Family(
        _of("Granite", embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=3.0),
        products={"GraniteMLP": "separate"},
    ),
    "cohere2": Family(_of("Cohere2", sliding_window=6, **SPECIAL), 1, products={"Cohere2MLP": "separate"}),
    "mixtral": Family(_of("Mixtral", num_local_experts=4, **EXPERTS), products={"MixtralExperts": "experts"}),
    "qwen3-moe": Family(
        _of("Qwen3Moe", head_dim=16, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[1], **EXPERTS),
        4,
        products={"Qwen3MoeExperts": "experts", "Qwen3MoeMLP": "separate"},
    ),
    "gpt-oss": Family(
        _of("GptOss", head_dim=16, sliding_window=6, num_local_experts=4, **EXPERTS, **SPECIAL),
        products={"GptOssExperts": "experts_gpt_oss"},
    ),
    "gpt2": Family(
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=48,
                n_layer=3,
                n_head=4,
                n_positions=512,
                initializer_range=0.2,
                **DROPOUT_OFF,
                **SPECIAL,
            )
        ),
        gated=0,
        layers="transformer.h",
        attention="attn",
    ),
    "gpt-neox": Family(_of("GPTNeoX", **SPECIAL), gated=0, layers="gpt_neox.layers", attention="attention"),
    "falcon": Family(
        _of("Falcon", num_kv_heads=2, new_decoder_architecture=True, alibi=False, **SPECIAL),
        gated=0,
        layers="transformer.h",
        attention="self_attention",
    ),
}

#: A decoder of each kind: rotary, with soft caps and norms behind, with experts, with learned positions. On the others
#: it is the same proof again.
KINDS = ("llama", "gemma2", "mixtral", "gpt2")

#: Encoders that see both ways, and the sizes of what they explain.
ENCODERS: dict[str, Family] = {
    "bert": Family(
        _of("Bert", model="ForMaskedLM"),
        other_norms=2,
        gated=0,
        layers="bert.encoder.layer",
        attention="attention.self",
    ),
    "bert-classifier": Family(
        _of("Bert", model="ForSequenceClassification", num_labels=5),
        gated=0,
        layers="bert.encoder.layer",
        attention="attention.self",
    ),
    "modernbert": Family(
        _of("ModernBert", model="ForMaskedLM", local_attention=8, global_attn_every_n_layers=3, **SPECIAL),
        other_norms=3,
        products={"ModernBertMLP": "fused_modernbert"},
        attention="attn",
    ),
}


def make(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of a family in evaluation mode, with norm weights that are not all 1."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **ENCODERS}[family].build()
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
