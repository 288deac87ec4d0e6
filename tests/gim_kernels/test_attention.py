"""attention() and its engines against formulas written here, and against torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gim_kernels
from gim_kernels import blockwise, reference
from gim_kernels.engines import ENGINES, Options
from tests.oracle import assert_close64, assert_within_budget, relative_error

RULES = [("exact", 2.0), ("temperature", 2.0), ("temperature", 3.3), ("temperature", 0.7), ("constant", 2.0)]
RULE_IDS = [f"{rule}-{temperature:g}" for rule, temperature in RULES]


def by_loops(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    *,
    rule: str,
    temperature: float,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_range: torch.Tensor | None = None,
    grad_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> dict[str, torch.Tensor]:
    """The forward and the four gradients, one query row at a time, straight from the definition."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    out = torch.zeros_like(query)
    grads = {name: torch.zeros_like(x) for name, x in (("query", query), ("key", key), ("value", value))}
    grads["sinks"] = torch.zeros(heads, dtype=query.dtype)
    for b in range(batch):
        first, end = (0, keys) if key_range is None else key_range[b].tolist()
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(queries):
                position = i + keys - queries
                seen = [
                    j
                    for j in range(first, end)
                    if (not causal or j <= position) and (window is None or j > position - window)
                ]
                if not seen:
                    continue
                raw = scale * (key[b, g, seen] @ query[b, h, i])
                capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
                sink = None if sinks is None else sinks[h : h + 1]
                full = capped if sink is None else torch.cat([capped, sink])
                weights = torch.softmax(full, -1)
                values = value[b, g, seen]
                out[b, h, i] = weights[: len(seen)] @ values
                upstream = grad_out[b, h, i]
                grads["value"][b, g, seen] += grad_scale[2] * weights[: len(seen), None] * upstream
                if rule == "constant":
                    continue
                softened = torch.softmax(full / (temperature if rule == "temperature" else 1.0), -1)
                grad_weights = values @ upstream
                if sink is not None:
                    grad_weights = torch.cat([grad_weights, torch.zeros(1, dtype=query.dtype)])
                grad_full = softened * (grad_weights - softened @ grad_weights)
                if sink is not None:
                    grads["sinks"][h] += grad_full[-1]
                grad_raw = grad_full[: len(seen)]
                if softcap is not None:
                    grad_raw = grad_raw * (1 - (capped / softcap) ** 2)
                grads["query"][b, h, i] += grad_scale[0] * scale * grad_raw @ key[b, g, seen]
                grads["key"][b, g, seen] += grad_scale[1] * scale * grad_raw[:, None] * query[b, h, i]
    return {"out": out, **grads}


def differentiate(
    function: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The output and every gradient of an attention function, by autograd."""
    inputs = {"query": query, "key": key, "value": value}
    if sinks is not None:
        inputs["sinks"] = sinks
    leaves = {name: x.detach().requires_grad_(True) for name, x in inputs.items()}
    out = function(**leaves, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def make(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    size: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key, value as the strided [B, H, T, D] views that models make, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def view(length: int, count: int) -> torch.Tensor:
        flat = torch.randn(batch, length, count, size, generator=generator, dtype=torch.float64)
        return flat.to(dtype).transpose(1, 2)

    return view(queries, heads), view(keys, kv_heads), view(keys, kv_heads), view(queries, heads)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "window-not-causal": {"window": 2},
    "softcap": {"causal": True, "softcap": 0.8},
    "padded-left": {"causal": True, "key_range": [[4, 9], [0, 9]]},
    "padded-right": {"causal": True, "key_range": [[0, 9], [0, 5]]},
    "no-key": {"key_range": [[3, 3], [0, 9]]},
}


@pytest.mark.parametrize("engine", ["reference", "blockwise"])
@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_rule_is_its_definition(option: str, sinks: bool, rule: str, temperature: float, engine: str) -> None:
    options = dict(OPTIONS[option])
    if "key_range" in options:
        options["key_range"] = torch.tensor(options["key_range"], dtype=torch.int32)
    query, key, value, grad_out = make(2, 4, 2, 7, 9, 5)
    sink = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if sinks else None
    factors = (0.25, 0.3, 0.5)
    want = by_loops(
        query, key, value, grad_out, rule=rule, temperature=temperature, scale=0.37, sinks=sink, grad_scale=factors,
        **options,
    )  # fmt: skip
    got = differentiate(
        gim_kernels.attention, query, key, value, grad_out, sinks=sink, scale=0.37, softmax_backward=rule,
        temperature=temperature, grad_scale=factors, engine=engine, **options,
    )  # fmt: skip
    for name, x in got.items():
        assert_close64(x, want[name], f"{engine} {name}")


SHAPES = [
    (1, 2, 2, 1, 1, 16),
    (2, 4, 1, 63, 63, 24),
    (1, 6, 2, 111, 111, 40),
    (1, 2, 1, 128, 128, 64),
    (1, 2, 2, 300, 300, 8),
    (2, 2, 1, 1, 129, 16),
    (1, 2, 1, 64, 150, 16),
    (1, 2, 2, 150, 64, 16),
]


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-H{}-K{}-T{}-S{}-D{}".format(*s))
def test_blockwise_stays_within_the_error_budget(
    shape: tuple[int, ...], rule: str, temperature: float, dtype: torch.dtype
) -> None:
    tensors = make(*shape, dtype=dtype)
    options: dict[str, Any] = {"causal": True, "softmax_backward": rule, "temperature": temperature}
    got = differentiate(gim_kernels.attention, *tensors, engine="blockwise", **options)
    yardstick = differentiate(reference.attention, *tensors, **options)
    truth = differentiate(reference.attention, *(x.double() for x in tensors), **options)
    for name, x in got.items():
        assert_within_budget(x, truth[name], yardstick[name], name)


@settings(max_examples=120)
@given(data=st.data())
def test_blockwise_equals_the_reference_for_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, 160)), draw(st.integers(1, 160))
    tensors = make(
        batch, kv_heads * group, kv_heads, queries, keys, draw(st.integers(1, 33)), seed=draw(st.integers(0, 9))
    )
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 170)),
        "softcap": draw(st.none() | st.floats(0.3, 30.0)),
        "scale": draw(st.none() | st.floats(-1.0, 1.0)),
        "softmax_backward": draw(st.sampled_from(["exact", "temperature", "constant"])),
        "temperature": draw(st.floats(0.25, 8.0)),
        "grad_scale": (0.25, 0.25, 0.5),
    }
    if draw(st.booleans()):
        ends = [sorted((draw(st.integers(0, keys)), draw(st.integers(0, keys)))) for _ in range(batch)]
        options["key_range"] = torch.tensor(ends, dtype=torch.int32)
    sinks = torch.linspace(-2, 2, kv_heads * group, dtype=torch.float64) if draw(st.booleans()) else None
    got = differentiate(gim_kernels.attention, *tensors, sinks=sinks, engine="blockwise", **options)
    want = differentiate(reference.attention, *tensors, sinks=sinks, **options)
    for name, x in got.items():
        assert_close64(x, want[name], name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_forward_does_not_depend_on_the_rule(dtype: torch.dtype) -> None:
    query, key, value, _ = make(2, 4, 2, 70, 70, 16, dtype=dtype)
    plain = gim_kernels.attention(query, key, value, causal=True)
    for rule, temperature in RULES:
        out = gim_kernels.attention(
            query, key, value, causal=True, softmax_backward=rule, temperature=temperature, grad_scale=(0.1, 0.2, 0.3)
        )  # fmt: skip
        assert torch.equal(out, plain), rule


@pytest.mark.parametrize("engine", ["reference", "blockwise"])
def test_plain_settings_equal_torch(engine: str) -> None:
    query, key, value, grad_out = make(2, 4, 2, 50, 50, 16)
    got = differentiate(gim_kernels.attention, query, key, value, grad_out, causal=True, engine=engine)
    want = differentiate(
        lambda **x: F.scaled_dot_product_attention(**x, is_causal=True, enable_gqa=True), query, key, value, grad_out
    )
    for name, x in got.items():
        assert_close64(x, want[name], name)


@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
def test_deterministic_and_a_second_backward_is_the_same(rule: str, temperature: float) -> None:
    query, key, value, grad_out = make(2, 4, 2, 131, 131, 32, dtype=torch.float32)
    runs = []
    for _ in range(2):
        leaves = [x.detach().clone().requires_grad_(True) for x in (query, key, value)]
        out = gim_kernels.attention(*leaves, causal=True, softmax_backward=rule, temperature=temperature)
        first = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
        second = torch.autograd.grad(out, leaves, grad_out)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        runs.append((out, *first))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    query, key, value, _ = make(1, 1, 1, 4, 4, 4)
    query.requires_grad_(True)
    out = gim_kernels.attention(query, key, value, softmax_backward="temperature")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), query)


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, ...]] = []
    original = blockwise.attention_backward

    def spy(*args: Any, needs: tuple[bool, ...], **named: Any) -> Any:
        asked.append(needs)
        grads = original(*args, needs=needs, **named)
        assert [grad is not None for grad in grads] == list(needs)
        return grads

    monkeypatch.setattr(blockwise, "attention_backward", spy)
    query, key, value, grad_out = make(1, 2, 1, 5, 5, 4)
    value.requires_grad_(True)
    gim_kernels.attention(query, key, value).backward(grad_out)
    assert asked == [(False, False, True, False)]


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 5.0}], ids=["plain", "window", "softcap"])
def test_live_and_saved_bytes_are_linear_in_length(rule: str, temperature: float, options: dict[str, Any]) -> None:
    largest, saved = {}, {}
    for length in (1024, 2048):
        tensors = make(1, 2, 1, length, length, 16, dtype=torch.float32)
        leaves = [x.requires_grad_(True) for x in tensors[:3]]
        kept = 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.untyped_storage().nbytes()
            return x

        with Largest() as mode:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = gim_kernels.attention(
                    *leaves, causal=True, softmax_backward=rule, temperature=temperature, **options
                )
            torch.autograd.grad(out, leaves, tensors[3])
        largest[length], saved[length] = mode.elements, kept
    assert largest[2048] <= 2 * largest[1024]
    assert saved[2048] <= 2 * saved[1024] + 64
    assert largest[2048] < 2048 * 2048 / 4


@pytest.mark.parametrize(("rule", "temperature"), RULES, ids=RULE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["fp64", "fp16"])
def test_key_heads_in_one_block_or_several(
    dtype: torch.dtype, rule: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make(2, 6, 3, 70, 90, 8, dtype=dtype)
    options: dict[str, Any] = {"causal": True, "window": 40, "softcap": 3.0, "sinks": torch.linspace(-1, 1, 6)}
    options |= {"key_range": torch.tensor([[0, 90], [7, 80]], dtype=torch.int32)}
    options |= {"softmax_backward": rule, "temperature": temperature, "grad_scale": (0.5, 0.25, 2.0)}

    def run(function: Any, convert: Any) -> dict[str, torch.Tensor]:
        given = {**options, "sinks": convert(options["sinks"].to(dtype))}
        return differentiate(function, *(convert(x) for x in tensors), **given)

    truth, yardstick = (run(reference.attention, convert) for convert in (torch.Tensor.double, lambda x: x))
    for scores, heads in ((1 << 21, 3), (1, 2)):  # two of three heads, and then the third
        monkeypatch.setattr(blockwise, "SCORES", scores)
        assert blockwise.tile_of(70, 90, 3, 2, Options(1.0, True, 40)).heads == heads
        for name, got in run(gim_kernels.attention, lambda x: x).items():
            assert_within_budget(got, truth[name], yardstick[name], f"{name}, {heads} heads")
    assert blockwise.tile_of(1 << 17, 1 << 17, 8, 1, Options(1.0, True)).heads == 1


def test_empty_tiles_are_not_visited() -> None:
    options = Options(scale=1.0, causal=True, window=64)
    blocks = list(blockwise.blocks(1024, 1024, options, 0, 1024, 32))
    assert max(block.keys for block in blocks) <= 32 + 64
    assert sum(block.keys for block in blocks) < 1024 * 3.1
    padded = list(blockwise.blocks(64, 64, Options(1.0, causal=True), 48, 64, 16))
    assert [block.keys for block in padded] == [0, 0, 0, 16]


# ---- scaled_dot_product_attention


@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (2, 3, 4, 6, 8), (3, 6, 8)], ids=["4d", "5d", "3d"])
@pytest.mark.parametrize("causal", [False, True])
def test_torch_signature_equals_torch(shape: tuple[int, ...], causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(shape, generator=generator, dtype=torch.float64)
    for keys in (4, 6, 9):
        key, value = torch.randn(2, *shape[:-2], keys, shape[-1], generator=generator, dtype=torch.float64)
        grad_out = torch.randn(shape, generator=generator, dtype=torch.float64)
        for engine in ("blockwise", "reference"):
            got = differentiate(
                gim_kernels.scaled_dot_product_attention, query, key, value, grad_out, is_causal=causal, engine=engine
            )
            want = differentiate(F.scaled_dot_product_attention, query, key, value, grad_out, is_causal=causal)
            for name, x in got.items():
                assert_close64(x, want[name], f"{keys} keys {name}")


def test_torch_signature_takes_a_padding_mask() -> None:
    query, key, value, _ = make(2, 4, 2, 6, 9, 8)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :4], mask[1, ..., 7:] = False, False
    got = gim_kernels.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    want = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert_close64(got, want, "out")


# ---- bad input

GOOD = make(2, 4, 2, 6, 6, 8)
Q, K, V, _ = GOOD


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": Q[0]}, ValueError, r"query must have 4 dimensions.*\(4, 6, 8\)"),
        ({"query": Q.to(torch.int64)}, TypeError, "query must be float32.*int64"),
        ({"key": [1]}, TypeError, "key must be a tensor, got list"),
        ({"key": K.float()}, TypeError, "key must have query's dtype torch.float64, got torch.float32"),
        ({"value": V.to("meta")}, ValueError, "value must be on query's device cpu, got meta"),
        ({"value": V[:, :, :5]}, ValueError, "value must have key's shape"),
        ({"key": K[:1], "value": V[:1]}, ValueError, "key must have query's batch size 2, got 1"),
        ({"key": K[..., :4], "value": V[..., :4]}, ValueError, "key must have query's head size 8, got 4"),
        ({"query": Q[:, :3]}, ValueError, "multiple of key heads, got 3 query heads and 2 key heads"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"window": 0}, ValueError, "window must be an integer >= 1 or None, got 0"),
        ({"window": True}, ValueError, "window must be an integer >= 1"),
        ({"softcap": 0.0}, ValueError, "softcap must be a finite number > 0, got 0.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number > 0"),
        ({"softmax_backward": "soft"}, ValueError, "softmax_backward must be one of"),
        ({"grad_scale": (1.0, 2.0)}, ValueError, "grad_scale must be three finite factors"),
        ({"grad_scale": (1.0, 2.0, math.inf)}, ValueError, "grad_scale must be three finite factors"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \[HQ\] = \[4\], got \(3,\)"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, "sinks must be floating point"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on query's device"),
        ({"key_range": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, r"key_range must have shape \[B, 2\]"),
        ({"key_range": torch.zeros(2, 2)}, TypeError, "key_range must be int32"),
        ({"key_range": torch.zeros(2, 2, dtype=torch.int32, device="meta")}, ValueError, "key_range must be on"),
        ({"engine": "fast"}, ValueError, "engine must be one of"),
    ],
)  # fmt: skip
def test_attention_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    # Every engine refuses in the same words: before it is even chosen, so nothing can have been launched.
    for engine in ENGINES:
        given_arguments = {"query": Q, "key": K, "value": V, "engine": engine, **arguments}
        with pytest.raises(error, match=message):
            gim_kernels.attention(**given_arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
        ({"attn_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, ValueError, r"one bit for each key.*O\(T\^2\)"),
        ({"attn_mask": torch.zeros(2, 1, 1, 6)}, TypeError, "attn_mask must be boolean"),
        ({"attn_mask": torch.ones(2, 1, 1, 6).bool(), "is_causal": True}, ValueError, "attn_mask must be None when"),
        (
            {"attn_mask": torch.tensor([1, 1, 0, 1, 1, 1]).bool().expand(2, 1, 1, 6)},
            ValueError,
            "attn_mask must have no holes: row 0 has 5 visible keys between key 0 and key 5",
        ),
        ({"enable_gqa": False}, ValueError, "key must have query's 4 heads unless enable_gqa is True, got 2"),
        ({"query": Q[0]}, ValueError, "same number of dimensions"),
    ],
)
def test_torch_signature_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given_arguments = {"query": Q, "key": K, "value": V, "enable_gqa": True, **arguments}
    with pytest.raises(error, match=message):
        gim_kernels.scaled_dot_product_attention(**given_arguments)


def test_the_operator_passes_torch_checks() -> None:
    query, key, value, _ = make(1, 2, 1, 5, 5, 8)
    for x in (query, key, value):
        x.requires_grad_(True)
    arguments = (
        query,
        key,
        value,
        None,
        None,
        0.3,
        True,
        None,
        None,
        "temperature",
        2.0,
        [0.25, 0.25, 0.5],
        "blockwise",
    )
    torch.library.opcheck(torch.ops.gim_kernels.attention.default, arguments)


def test_a_checkpoint_gives_the_same_gradient() -> None:
    query, key, value, grad_out = make(1, 2, 2, 40, 40, 8)
    grads = []
    for wrap in (lambda f, *x: f(*x), torch.utils.checkpoint.checkpoint):
        leaves = [x.detach().requires_grad_(True) for x in (query, key, value)]

        def attend(*x: torch.Tensor) -> torch.Tensor:
            return gim_kernels.attention(*x, causal=True, softmax_backward="temperature")

        named = {} if wrap is not torch.utils.checkpoint.checkpoint else {"use_reentrant": False}
        grads.append(torch.autograd.grad(wrap(attend, *leaves, **named), leaves, grad_out))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_extreme_scores_stay_finite() -> None:
    query, key, value, grad_out = make(1, 2, 2, 33, 33, 8, dtype=torch.float32)
    tensors = (query * 300, key * 300, value, grad_out)
    for rule, temperature in RULES:
        options: dict[str, Any] = {"causal": True, "softmax_backward": rule, "temperature": temperature}
        got = differentiate(gim_kernels.attention, *tensors, **options)
        truth = differentiate(reference.attention, *(x.double() for x in tensors), **options)
        for name, x in got.items():
            assert bool(torch.isfinite(x).all()), f"{rule} {name}"
        # Scores of 1e5 carry an absolute rounding error near 1e-2: only the order of magnitude can agree.
        assert relative_error(got["out"], truth["out"]) < 0.1
