"""torch's signature of attention, and what both signatures refuse."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gim_kernels
from gim_kernels import reference
from gim_kernels.types import ENGINES, Engine
from tests.gim_kernels.test_attention import differentiate, make
from tests.oracle import assert_close64


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


#: Every rule, and no rule with factors of its own.
RULES: dict[str, dict[str, Any]] = {
    "exact": {},
    "temperature": {"softmax_backward": "temperature", "grad_scale": (0.25, 0.25, 0.5)},
    "constant": {"softmax_backward": "constant", "grad_scale": (0.25, 0.25, 0.5)},
}


@pytest.mark.parametrize("engine", ["blockwise", "composed", "reference"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [1, 5, 8, 19])
def test_values_may_have_another_width_than_keys(width: int, rule: str, engine: Engine) -> None:
    """Latent attention; the scale stays that of the keys' width."""
    query, key, _, _ = make(2, 4, 2, 6, 9, 8)
    value, grad_out = make(2, 2, 2, 9, 9, width, seed=1)[1], make(2, 4, 2, 6, 9, width, seed=2)[3]
    options: dict[str, Any] = {"causal": True, "window": 5, **RULES[rule]}
    got = differentiate(gim_kernels.attention, query, key, value, grad_out, engine=engine, **options)
    want = differentiate(reference.attention, query, key, value, grad_out, **options)
    for name, x in got.items():
        assert_close64(x, want[name], name)


#: Shapes of query, key and value that torch broadcasts, and whether heads are shared.
BROADCAST: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "no heads": ((6, 8), (9, 8), (9, 8), False),
    "heads are a batch": ((4, 6, 8), (4, 9, 8), (4, 9, 5), False),
    "one head of keys": ((2, 4, 6, 8), (2, 1, 9, 8), (2, 1, 9, 8), False),
    "one head of keys, no batch": ((4, 6, 8), (1, 9, 8), (1, 9, 8), False),
    "one head of keys, many of values": ((2, 4, 6, 8), (2, 1, 9, 8), (2, 4, 9, 8), False),
    "one head of queries": ((2, 1, 6, 8), (2, 4, 9, 8), (2, 4, 9, 8), False),
    "one row of keys": ((3, 4, 6, 8), (1, 4, 9, 8), (1, 4, 9, 8), False),
    "one row of queries": ((1, 4, 6, 8), (3, 4, 9, 8), (3, 4, 9, 8), False),
    "one row of keys, many of values": ((1, 4, 6, 8), (1, 2, 9, 8), (3, 2, 9, 8), True),
    "one row and head of keys": ((3, 4, 6, 8), (1, 1, 9, 8), (1, 1, 9, 8), False),
    "keys without a batch": ((2, 4, 6, 8), (4, 9, 8), (9, 8), False),
    "queries without a batch": ((6, 8), (2, 4, 9, 8), (2, 4, 9, 8), False),
    "two batches": ((2, 3, 4, 6, 8), (2, 3, 4, 9, 8), (2, 3, 4, 9, 8), False),
    "two batches, of which one": ((2, 3, 4, 6, 8), (1, 3, 1, 9, 8), (2, 1, 1, 9, 5), False),
    "shared heads without a batch": ((4, 6, 8), (2, 9, 8), (2, 9, 8), True),
    "shared heads of two batches": ((2, 3, 4, 6, 8), (3, 2, 9, 8), (2, 3, 2, 9, 8), True),
    "more heads of values than of keys": ((2, 4, 6, 8), (2, 2, 9, 8), (2, 4, 9, 8), True),
    "an empty batch": ((0, 4, 6, 8), (0, 4, 9, 8), (0, 4, 9, 8), False),
    "no queries": ((2, 4, 0, 8), (2, 4, 9, 8), (2, 4, 9, 8), False),
    "no keys": ((2, 4, 6, 8), (2, 4, 0, 8), (2, 4, 0, 8), False),
    "values of no width": ((2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 0), False),
}


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool, rule: dict[str, Any], **_: Any
) -> torch.Tensor:
    """The rule by broadcasting, repeating and softmax alone."""
    factors = rule.get("grad_scale", (1.0, 1.0, 1.0))
    q, k, v = (reference.scale_gradient(x, by) for x, by in zip((query, key, value), factors, strict=True))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return reference.attention_weights(scores, rule.get("softmax_backward", "exact"), 2.0) @ v


@pytest.mark.parametrize("engine", ["blockwise", "composed", "reference"])
@pytest.mark.parametrize("name", BROADCAST)
def test_what_torch_broadcasts_is_broadcast(name: str, engine: Engine) -> None:
    generator = torch.Generator().manual_seed(0)
    *shapes, enable_gqa = BROADCAST[name]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    inputs = (query, key, value, grad_out)
    for rule, options in RULES.items():
        function = functools.partial(gim_kernels.scaled_dot_product_attention, engine=engine, **options)
        got = differentiate(function, *inputs, enable_gqa=enable_gqa)
        wants = [differentiate(written_out, *inputs, enable_gqa=enable_gqa, rule=options)]
        if rule == "exact":
            wants.append(differentiate(F.scaled_dot_product_attention, *inputs, enable_gqa=enable_gqa))
        for want in wants:
            for part, x in got.items():
                assert_close64(x, want[part].nan_to_num(), f"{rule} {part}")


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 9), (1, 1, 9), (2, 3, 1, 1, 9), (1, 3, 1, 1, 9)])
def test_torch_signature_broadcasts_a_padding_mask(shape: tuple[int, ...]) -> None:
    lead = (2, 3) if len(shape) != 4 else (2,)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(*lead, 4, 6, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, *lead, 4, 9, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(9) < torch.randint(4, 9, (*shape[:-1], 1), generator=generator)
    got = gim_kernels.scaled_dot_product_attention(query, key, value, mask)
    assert_close64(got, F.scaled_dot_product_attention(query, key, value, mask), "out")


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
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, TypeError, "sinks must be float32.*int32"),
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
        ({"query": Q[0, 0, 0]}, ValueError, "must have 2 dimensions or more, got Q"),
        ({"key": K.expand(2, 2, 6, 8)[:, :1].expand(2, 3, 6, 8)}, ValueError, "a multiple of key heads and of value"),
        ({"key": K[:1].expand(3, 2, 6, 8), "value": V[:1]}, ValueError, "batch sizes that are the same or 1, got Q"),
        ({"attn_mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"attn_mask must have 2 to 4 dimensions.*\(6,\)"),
    ],
)
def test_torch_signature_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given_arguments = {"query": Q, "key": K, "value": V, "enable_gqa": True, **arguments}
    with pytest.raises(error, match=message):
        gim_kernels.scaled_dot_product_attention(**given_arguments)
