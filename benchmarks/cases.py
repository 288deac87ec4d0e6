"""What is timed: every case declared once, with its sizes, its floating-point operations and its bytes.

Operations and bytes are the least that any implementation of the same mathematics needs without keeping a T x T matrix:
each row's share of the roofline is measured against them. A new configuration is a row here, not a branch elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from benchmarks.measure import DTYPES

Rule = Literal["exact", "temperature", "constant"]
Part = Literal["step", "forward"]

#: Matrix products of a step, as FlashAttention counts them: two forward, five backward, of which the scores again. A
#: constant softmax needs the scores and grad_value only.
PRODUCTS: dict[Rule, int] = {"exact": 7, "temperature": 7, "constant": 4}
#: Length at which every system is held against float64 before anything is timed.
CHECK_TOKENS = 256


def _visible(tokens: int, window: int | None = None) -> float:
    """Scores of one head that a causal mask, and a window, leave."""
    reach = tokens if window is None else min(window, tokens)
    return reach * (reach + 1) / 2 + (tokens - reach) * reach


@dataclass(frozen=True)
class AttentionCase:
    """Attention alone: forward, or forward and backward.

    Args:
        rule: the softmax's backward.
        head_size, tokens, heads, kv_heads: D, T (as many keys as queries), HQ and HK.
        causal: with the causal mask.
        dtype: of query, key and value.
        part: ``"forward"``, or ``"step"`` with the backward.
    """

    op: ClassVar[str] = "attention"

    rule: Rule
    head_size: int
    tokens: int
    heads: int
    kv_heads: int
    causal: bool
    dtype: str
    part: Part = "step"

    @property
    def config(self) -> str:
        """All but the length: what one panel of a plot holds."""
        mask = "causal" if self.causal else "full"
        return f"{self.part} {self.rule} D{self.head_size} {self.heads}/{self.kv_heads} heads {mask} {self.dtype}"

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.op} {self.config} T{self.tokens}"

    @property
    def _scores(self) -> float:
        return self.heads * (_visible(self.tokens) if self.causal else self.tokens**2)

    @property
    def products(self) -> int:
        """Matrix products of T x T x D that count."""
        return 2 if self.part == "forward" else PRODUCTS[self.rule]

    def flops(self) -> float:
        """Floating-point operations, a product over visible scores being ``2 * D`` for each."""
        return 2.0 * self.products * self.head_size * self._scores

    def bytes(self) -> float:
        """Each input read and each result written once by each pass; the log-sum-exp in float32."""
        size = DTYPES[self.dtype].itemsize
        queries = self.heads * self.tokens * self.head_size * size
        keys = 2 * self.kv_heads * self.tokens * self.head_size * size
        lse = 4 * self.heads * self.tokens
        forward = 2 * queries + keys + lse
        backward = 4 * queries + 2 * keys + lse  # query, out, grad_out, grad_query; key, value and their gradients
        return float(forward if self.part == "forward" else forward + backward)

    def tensor_bytes(self) -> int:
        """What inputs, output and gradients hold together."""
        size = DTYPES[self.dtype].itemsize
        return (4 * self.heads + 4 * self.kv_heads) * self.tokens * self.head_size * size

    def eager_bytes(self) -> int:
        """Memory that eager attention needs at its peak, from below: the scores and three matrices like them."""
        matrices = 2 if self.part == "forward" else 4
        return matrices * self.heads * self.tokens**2 * DTYPES[self.dtype].itemsize

    def small(self) -> AttentionCase:
        """The same at a length that the oracle can hold, with one or two heads of each group."""
        kv_heads = min(self.kv_heads, 2)
        group = self.heads // self.kv_heads
        return dataclasses.replace(
            self, tokens=min(self.tokens, CHECK_TOKENS), kv_heads=kv_heads, heads=kv_heads * group
        )

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query ``[1, HQ, T, D]``, key and value ``[1, HK, T, D]``, and the gradient of the output; always the same."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int) -> torch.Tensor:
            shape = (1, self.tokens, heads, self.head_size)  # as a model's projections lay it out
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return x.to(DTYPES[self.dtype]).transpose(1, 2)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)


@dataclass(frozen=True)
class PointwiseCase:
    """A norm or a gated product, forward and backward.

    Args:
        op: ``"rms_norm"``, ``"layer_norm"`` or ``"gated"``.
        tokens, width: rows and elements of each.
        dtype: of the input.
        frozen: of norms: whether the statistic is a constant.
    """

    op: str
    tokens: int
    width: int
    dtype: str
    frozen: bool = False

    @property
    def config(self) -> str:
        """All but the length."""
        return f"width {self.width} {self.dtype}" + (" frozen" if self.frozen else "")

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.op} {self.config} T{self.tokens}"

    def bytes(self) -> float:
        """Passes over the rows, each once: gate, up, product; grad, gate, up and the two gradients; norms likewise."""
        passes = 8 if self.op == "gated" else 4 if self.frozen else 5
        return float(passes * self.tokens * self.width * DTYPES[self.dtype].itemsize)

    def flops(self) -> float:
        """A few for each element: never what bounds it."""
        return 20.0 * self.tokens * self.width

    def tensor_bytes(self) -> int:
        """What inputs, results and gradients hold together."""
        return 8 * self.tokens * self.width * DTYPES[self.dtype].itemsize

    def eager_bytes(self) -> int:
        """As the tensors: eager keeps a few copies in float32."""
        return 4 * self.tokens * self.width * 4

    def small(self) -> PointwiseCase:
        """The same with few rows."""
        return dataclasses.replace(self, tokens=min(self.tokens, 64))

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Two inputs ``[T, WIDTH]`` and the gradient of the result; always the same."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (self.tokens, self.width)
        return tuple(torch.randn(shape, generator=generator, device=device).to(DTYPES[self.dtype]) for _ in range(3))


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Hugging Face decoder; ``options`` are further entries of its config."""

    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def parameters_in_layers(self) -> int:
        """Weights that a token passes on its way, head and embedding not counted."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def parameters(self) -> int:
        """All weights, the head counted as if it were tied where the config ties it."""
        tied = self.options.get("tie_word_embeddings", False)
        return self.parameters_in_layers + (1 if tied else 2) * self.vocabulary * self.hidden

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer; None for attention to everything before."""
        config = self.config()
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * self.layers
        return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)

    def config(self) -> Any:
        """The Hugging Face config, for prompts of any length here."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.family,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            vocab_size=self.vocabulary,
            max_position_embeddings=1 << 18,
            **self.options,
        )


_TIED = {"tie_word_embeddings": True}
#: Published sizes, from the models' config files; weights are random.
DECODERS: dict[str, Decoder] = {
    "llama-8x512": Decoder("llama", 8, 512, 1408, 8, 2, 64, 4096),
    "llama-4x256": Decoder("llama", 4, 256, 704, 4, 2, 64, 1024),
    "Llama-3.2-1B": Decoder("llama", 16, 2048, 8192, 32, 8, 64, 128256, _TIED),
    "Llama-3.1-8B": Decoder("llama", 32, 4096, 14336, 32, 8, 128, 128256),
    "Qwen2.5-1.5B": Decoder("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, _TIED),
    "Qwen2.5-3B": Decoder("qwen2", 36, 2048, 11008, 16, 2, 128, 151936, _TIED),
    "Gemma-2-2B": Decoder("gemma2", 26, 2304, 9216, 8, 4, 256, 256000, _TIED),
}


@functools.lru_cache(maxsize=1)
def _model(sizes: Decoder, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, the same every time, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(sizes.config())
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def forget_models() -> None:
    """Free the model that is kept for the next length."""
    _model.cache_clear()


@dataclass(frozen=True)
class ExplainCase:
    """One attribution end to end, forward and backward, of a decoder with random weights.

    Args:
        model: a name in :data:`DECODERS`.
        tokens: prompt length T.
        dtype: of the weights.
        decoder: other sizes than those of the name.
        rule: the softmax's backward.
    """

    op: ClassVar[str] = "explain"

    model: str
    tokens: int
    dtype: str
    decoder: Decoder | None = None
    rule: Rule = "temperature"

    @property
    def sizes(self) -> Decoder:
        """The decoder's sizes."""
        return self.decoder or DECODERS[self.model]

    @property
    def config(self) -> str:
        """All but the length."""
        return f"{self.model} {self.dtype}"

    @property
    def name(self) -> str:
        """Unique among all cases."""
        return f"{self.op} {self.config} T{self.tokens}"

    def flops(self) -> float:
        """Linear layers, forward and the gradient of their input, and attention's products over visible scores.

        Weights are frozen. The last layer needs keys and values of every token, and all else at one position, which
        is not counted. Where the softmax is a constant, nothing flows back into queries and keys.
        """
        one = self.sizes
        keys = one.hidden * one.kv_heads * one.head_size
        whole = (one.layers - 1) * one.parameters_in_layers // one.layers
        linear = 2 * (whole + 2 * keys)
        if self.rule == "constant":
            linear -= (one.layers - 1) * one.hidden * one.heads * one.head_size + one.layers * keys
        scores = one.heads * sum(_visible(self.tokens, window) for window in one.windows[:-1])
        return 2.0 * self.tokens * linear + 2.0 * PRODUCTS[self.rule] * one.head_size * scores

    def bytes(self) -> float:
        """The weights of all layers, read by each pass."""
        return 2.0 * self.sizes.parameters_in_layers * DTYPES[self.dtype].itemsize

    def tensor_bytes(self) -> int:
        """The weights, and what our leanest plan keeps: one input for each layer and a layer's working set."""
        one, size = self.sizes, DTYPES[self.dtype].itemsize
        kept = self.tokens * (one.layers * one.hidden + 4 * one.hidden + 6 * one.inner)
        return (one.parameters + kept) * size

    def eager_bytes(self) -> int:
        """Memory that eager GIM needs at its peak, from below: two T x T matrices kept for each layer."""
        one = self.sizes
        return one.layers * 2 * one.heads * self.tokens**2 * DTYPES[self.dtype].itemsize

    def small(self) -> ExplainCase:
        """Two layers of the same family, head size and grouping, at a length that the oracle can hold."""
        one = self.sizes
        kv_heads = min(2, one.kv_heads)
        heads = kv_heads * one.heads // one.kv_heads
        hidden = heads * 32
        few = dataclasses.replace(
            one, layers=2, hidden=hidden, inner=2 * hidden, heads=heads, kv_heads=kv_heads, vocabulary=512
        )
        return dataclasses.replace(self, tokens=min(self.tokens, CHECK_TOKENS), decoder=few)

    def build(self, device: torch.device) -> tuple[Any, torch.Tensor]:
        """The model in evaluation mode and the ids ``[1, T]`` on the device; the same every time."""
        # Of the large models one is kept for the next length; the small ones of the checks are made anew.
        make = _model.__wrapped__ if self.decoder else _model
        return make(self.sizes, DTYPES[self.dtype], device), self.ids(device)

    def ids(self, device: torch.device) -> torch.Tensor:
        """Random ids ``[1, T]``."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.sizes.vocabulary, (1, self.tokens), generator=generator).to(device)


Case = AttentionCase | PointwiseCase | ExplainCase

# ---------------------------------------------------------------------------------------------------------- suites

_K = 1024
_RULES: tuple[Rule, ...] = ("temperature", "exact", "constant")
#: Query and key heads: grouped as in Llama 3, and one key head for each query head.
_GPU_HEADS = ((32, 8), (32, 32))
_CPU_HEADS = ((8, 2), (8, 8))


def _attention(
    heads: Iterable[tuple[int, int]],
    sizes: Iterable[int],
    lengths: Iterable[int],
    dtypes: Iterable[str],
    masks: Iterable[bool],
    rules: Iterable[Rule] = _RULES,
) -> Iterator[AttentionCase]:
    for dtype, causal, size, (queries, keys), rule in itertools.product(dtypes, masks, sizes, heads, rules):
        for tokens in lengths:
            yield AttentionCase(rule, size, tokens, queries, keys, causal, dtype)


def _pointwise(lengths: Iterable[int], width: int, dtype: str) -> Iterator[PointwiseCase]:
    for tokens in lengths:
        for frozen in (True, False):
            yield PointwiseCase("rms_norm", tokens, width, dtype, frozen)
        yield PointwiseCase("layer_norm", tokens, width, dtype, True)
        yield PointwiseCase("gated", tokens, width, dtype)


def _unique(*groups: Iterable[Case]) -> tuple[Case, ...]:
    """All cases in order, each once: what matters most stands first, since a short run may not reach the end."""
    return tuple(dict.fromkeys(itertools.chain(*groups)))


_SMALL = (_K, 2 * _K, 4 * _K, 8 * _K)
_LONG = (8 * _K, 16 * _K, 4 * _K, _K, 2 * _K)
_ALL = tuple(_K << power for power in range(8))

#: By suite and device type.
SUITES: dict[str, dict[str, tuple[Case, ...]]] = {
    "quick": {
        "cpu": _unique(
            _attention([(8, 2)], [64], [512, _K, 2 * _K], ["float32"], [True], ["temperature", "constant"]),
            _pointwise([2 * _K], 2048, "float32"),
            [ExplainCase("llama-4x256", tokens, "float32") for tokens in (256, 512, _K)],
        ),
        "cuda": _unique(
            _attention([(32, 8)], [128], [2 * _K, 4 * _K, 8 * _K], ["bfloat16"], [True], ["temperature", "constant"]),
            _pointwise([8 * _K], 4096, "bfloat16"),
            [ExplainCase("Llama-3.2-1B", tokens, "bfloat16") for tokens in (_K, 2 * _K, 4 * _K)],
        ),
    },
    "attention": {
        "cpu": _unique(
            _attention([(8, 8)], [64], _SMALL, ["float32"], [True]),
            _attention(_CPU_HEADS, [64, 128, 256], _SMALL, ["float32", "bfloat16"], [True, False]),
        ),
        "cuda": _unique(
            [AttentionCase("exact", 128, tokens, 32, 32, True, "bfloat16", "forward") for tokens in _LONG[:2]],
            _attention([(32, 32)], [128], _LONG[:2], ["bfloat16"], [True]),
            _attention([(32, 32)], [64], _LONG[:2], ["bfloat16"], [True]),
            _attention([(32, 8)], [128], _LONG, ["bfloat16"], [True]),
            _attention(_GPU_HEADS, [128, 64, 256], _ALL, ["bfloat16", "float16"], [True, False]),
        ),
    },
    "pointwise": {
        "cpu": _unique(_pointwise(_SMALL, 2048, "float32")),
        "cuda": _unique(
            _pointwise((8 * _K, 32 * _K), 4096, "bfloat16"), _pointwise((8 * _K, 32 * _K), 14336, "bfloat16")
        ),
    },
    "explain": {
        "cpu": _unique(
            [ExplainCase("llama-8x512", tokens, "float32") for tokens in _SMALL],
        ),
        "cuda": _unique(
            [ExplainCase("Llama-3.2-1B", tokens, "bfloat16") for tokens in (4 * _K, 8 * _K, 16 * _K)],
            [ExplainCase("Llama-3.1-8B", tokens, "bfloat16") for tokens in (4 * _K, 16 * _K)],
            [
                ExplainCase(model, tokens, "bfloat16")
                for model in ("Qwen2.5-1.5B", "Qwen2.5-3B", "Gemma-2-2B")
                for tokens in (4 * _K, 16 * _K)
            ],
            [ExplainCase(model, 64 * _K, "bfloat16") for model in ("Llama-3.2-1B", "Llama-3.1-8B")],
        ),
    },
    "memory": {
        "cpu": _unique([ExplainCase("llama-4x256", tokens, "float32") for tokens in (*_SMALL, 16 * _K)]),
        "cuda": _unique([ExplainCase("Llama-3.1-8B", tokens, "bfloat16") for tokens in _ALL]),
    },
    # What `make gpu` is for: the rest of it is in "attention".
    "headline": {
        "cpu": _unique(_attention([(8, 8)], [64], [128], ["float32"], [True])),
        "cuda": _unique(
            _attention([(32, 32)], [128], [8 * _K], ["bfloat16"], [True]),
            _attention([(32, 8)], [128], [8 * _K], ["bfloat16"], [True]),
            _attention([(32, 32)], [64], [8 * _K], ["bfloat16"], [True]),
            _attention([(32, 8)], [64], [8 * _K], ["bfloat16"], [True]),
            _attention([(32, 8)], [128], [4 * _K, 2 * _K], ["bfloat16"], [True]),
            _attention([(32, 32)], [128, 64], [16 * _K], ["bfloat16"], [True]),
            _attention([(32, 8)], [64], [4 * _K, 2 * _K], ["bfloat16"], [True]),
        ),
    },
    "explain-8b": {
        "cpu": _unique([ExplainCase("llama-4x256", 64, "float32")]),
        "cuda": _unique([ExplainCase("Llama-3.1-8B", tokens, "bfloat16") for tokens in (4 * _K, 16 * _K, 32 * _K)]),
    },
    "long": {
        "cpu": _unique([ExplainCase("llama-4x256", 128, "float32")]),
        "cuda": _unique([ExplainCase("Llama-3.1-8B", 128 * _K, "bfloat16")]),
    },
}
