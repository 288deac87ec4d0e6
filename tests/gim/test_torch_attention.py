"""Every way in which torch's function of attention may be called: the rules are those of the same call written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gim
from gim.applied import UnsupportedModelError
from tests import eager
from tests.eager import EagerRules, attend
from tests.first import first
from tests.gim.test_functional import (
    BATCH,
    CAUSAL,
    HEADS,
    LENGTH,
    PADDING,
    SIZE,
    TRIANGLE,
    WIDTH,
    Weights,
    gradient,
    inputs,
    make,
    under,
)
from tests.gim_kernels.test_attention_arguments import BROADCAST
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

QUERIES, KEYS = 6, 9


class Attending(nn.Module):
    """Three projections, brought into the shapes of a call, and attention."""

    def __init__(self, shapes: Any, given: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shapes, self.given = shapes, given
        self.maps = nn.ParameterList(torch.randn(7, torch.Size(shape).numel()).double() for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ one).reshape(shape) for one, shape in zip(self.maps, self.shapes, strict=True))
        return F.scaled_dot_product_attention(q, k, v, **self.given)

    def written_out(self, x: torch.Tensor, rules: EagerRules) -> torch.Tensor:
        inputs = ((x @ one).reshape(shape) for one, shape in zip(self.maps, self.shapes, strict=True))
        q, k, v = (eager.scale(one, by) for one, by in zip(inputs, rules.qkv, strict=True))
        if self.given.get("enable_gqa"):
            k, v = (one.repeat_interleave(q.shape[-3] // one.shape[-3], -3) for one in (k, v))
        scores = q @ k.mT * self.given.get("scale", q.shape[-1] ** -0.5)
        mask = self.given.get("attn_mask")
        if self.given.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is None:
            return eager.softmax(scores, rules) @ v
        seen = mask if mask.dtype == torch.bool else mask == 0
        weights = eager.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), rules)
        return weights * seen.any(-1, keepdim=True) @ v  # a query that sees no key gives zeros


def check(shapes: Any, engine: Any = "auto", **given: Any) -> None:
    model, x = Attending(shapes, given), torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    own = model(x)
    for rules in ("GIM", "GIM_CONSTANT", "GRADIENT"):
        with gim.GIM(model, rules=rules, engine=engine) as report:
            out = model(x)
        assert report.complete and report.counts()["attention"] == (1, 1)
        assert_close64(out, own.nan_to_num(), f"{rules} output")
        want = model.written_out(x, eager.PRESETS[rules])
        upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).cos()
        got, grad = (torch.autograd.grad((one * upstream).sum(), x)[0] for one in (out, want))
        assert_close64(got, grad, f"{rules} gradient")


@pytest.mark.parametrize("name", BROADCAST)
def test_shapes_that_torch_broadcasts(name: str) -> None:
    *shapes, enable_gqa = BROADCAST[name]
    check(shapes, enable_gqa=enable_gqa)
    if 0 not in (*shapes[0], *shapes[1]):
        check(shapes, enable_gqa=enable_gqa, is_causal=True)
        check(shapes, enable_gqa=enable_gqa, attn_mask=torch.ones(QUERIES, KEYS).tril(2).bool())
        check(shapes, enable_gqa=enable_gqa, attn_mask=torch.arange(KEYS)[None] < 5, scale=0.7)


@pytest.mark.parametrize("engine", ["blockwise", "composed", "reference"])
@pytest.mark.parametrize("width", [3, 12])
def test_values_of_another_width(width: int, engine: str) -> None:
    shapes = ((2, 4, QUERIES, 8), (2, 2, KEYS, 8), (2, 2, KEYS, width))
    check(shapes, engine, enable_gqa=True)
    check(shapes, engine, enable_gqa=True, is_causal=True)
    check(shapes, engine, enable_gqa=True, attn_mask=torch.ones(QUERIES, KEYS).tril(3).bool(), scale=0.3)


@pytest.mark.parametrize(
    ("start", "window", "added", "engine"),
    first(
        itertools.product((0, 1, 3, 6), (None, 1, 3), (False, True), ("blockwise", "composed", "reference")),
        # Every place and window on an engine; one of them added to the scores, on every engine.
        lambda start, window, added, engine: added == (start == window == 3) and (added or engine == "blockwise"),
    ),
)
def test_a_static_cache(start: int, window: int | None, added: bool, engine: str) -> None:
    """A query at a place of the cache sees the slots up to its own; a row of the batch may start later."""
    place = torch.arange(start, start + QUERIES)[:, None]
    slots = torch.arange(14)
    mask = (slots <= place) & (slots > place - (window or 14))
    padded = mask & (slots >= torch.tensor([0, start])[:, None, None, None])
    shapes = ((2, 4, QUERIES, 8), (2, 4, 14, 8), (2, 4, 14, 8))
    for one in (mask, mask[None, None], padded):
        given = torch.zeros(one.shape).double().masked_fill(~one, -torch.inf) if added else one
        check(shapes, engine, attn_mask=given)


def test_a_static_cache_whose_rows_end_before_their_queries() -> None:
    """Padding on the right: the last query's own slot is one that nobody sees."""
    slots, place = torch.arange(12), torch.arange(2, 2 + QUERIES)[:, None]
    mask = (slots <= place) & (slots < torch.tensor([5, 6])[:, None, None, None])
    check(((2, 1, QUERIES, 8), (2, 1, 12, 8), (2, 1, 12, 8)), attn_mask=mask)


@pytest.mark.parametrize("shape", [(2, 1, 1, KEYS), (1, KEYS), (2, 3, 1, 1, KEYS), (1, 3, 1, QUERIES, KEYS)])
def test_masks_that_torch_broadcasts(shape: tuple[int, ...]) -> None:
    lead = (2,) if len(shape) == 4 else (2, 3)
    ends = 4 + torch.arange(torch.Size(shape[:-2]).numel()).reshape(*shape[:-2], 1, 1) % 4
    mask = torch.arange(KEYS) < ends
    if shape[-2] > 1:
        mask = mask & torch.ones(QUERIES, KEYS).tril(3).bool()
    check(((*lead, 4, QUERIES, 8), (*lead, 4, KEYS, 8), (*lead, 4, KEYS, 8)), attn_mask=mask)


@pytest.mark.parametrize("average", [False, True])
def test_a_static_cache_of_multi_head_attention(average: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=True).double().eval()
    x, memory = torch.randn(2, QUERIES, 16).double().requires_grad_(), torch.randn(2, 12, 16).double()
    hidden = torch.arange(12) > torch.arange(2, 2 + QUERIES)[:, None]
    padding = torch.arange(12) < torch.tensor([[0], [2]])
    given: dict[str, Any] = {"attn_mask": hidden, "key_padding_mask": padding, "average_attn_weights": average}
    want = model(x, memory, memory, **given)
    with gim.GIM(model, rules="GRADIENT") as report:
        got = model(x, memory, memory, **given)
    assert report.complete
    for one, other in zip(got, want, strict=True):
        assert_close64(one, other, "output")
        grad, expected = (torch.autograd.grad(y.cos().sum(), x, retain_graph=True)[0] for y in (one, other))
        assert_close64(grad, expected, "gradient")


# Weights that are asked for, every form of a module, and masks


@pytest.mark.parametrize("preset", ["GIM", "GIM_CONSTANT", "GRADIENT"])
@pytest.mark.parametrize("average", [True, False])
def test_weights_that_are_asked_for_follow_the_rule_too(preset: str, average: bool) -> None:
    model, rules = make(Weights), eager.PRESETS[preset]

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        mha = model.attention
        q, k, v = (
            (x @ w.T + b).view(BATCH, LENGTH, HEADS, SIZE).transpose(1, 2)
            for w, b in zip(mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True)
        )
        out = attend(q, k, v, CAUSAL, SIZE, rules).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)
        free = EagerRules(rules.temperature, rules.constant_softmax, qkv=(*rules.qkv[:2], 1))
        eye = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, HEADS, -1, -1)
        weights = attend(q, k, eye, CAUSAL, SIZE, free)
        weights = weights.mean(1) if average else weights
        return mha.out_proj(out).sum() + (weights * torch.arange(LENGTH)).pow(2).sum()

    masks = {"attn_mask": TRIANGLE, "average_attn_weights": average}
    got = under(model, preset, **masks)
    assert_close64(got, gradient(by_hand), preset, relative=FLOAT64_MODEL_RELATIVE)
    x = inputs()
    with gim.GIM(model):
        one = model.attention(x[0], x[0], x[0])
    own = model.attention(x[0], x[0], x[0])
    for got, want in zip(one, own, strict=True):
        assert_close64(got, want, "unbatched")


@pytest.mark.parametrize(
    "options", [{"kdim": 20, "vdim": 24}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}], ids=str
)
def test_every_form_of_multihead_attention_equals_torchs_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    query = torch.randn(5, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    key = torch.randn(9, 3, options.get("kdim", WIDTH), dtype=torch.float64)
    value = torch.randn(9, 3, options.get("vdim", WIDTH), dtype=torch.float64)
    own, own_weights = mha(query, key, value)
    with gim.GIM(mha, rules="GRADIENT"):
        out, weights = mha(query, key, value)
    assert_close64(out, own, "output")
    assert_close64(weights, own_weights, "weights")
    for ours, theirs in ((out, own), (weights, own_weights)):
        got, want = (torch.autograd.grad(y.pow(2).sum(), query, retain_graph=True)[0] for y in (ours, theirs))
        assert_close64(got, want, "gradient", relative=FLOAT64_MODEL_RELATIVE)


class Masked(nn.Module):
    """Attention with a mask as ``F.scaled_dot_product_attention`` takes it."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, **named: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, k, **named)


def additive(hidden: torch.Tensor, low: float) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, low)


WINDOW = CAUSAL | torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-4)
LATE = torch.ones(3, LENGTH, dtype=torch.bool).triu(LENGTH - 2)[None, None]  # three queries at the end of the keys


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    ("queries", "hidden"),
    [(LENGTH, CAUSAL), (LENGTH, WINDOW), (3, LATE), (LENGTH, CAUSAL | PADDING.flip(1)[:1, None, None])],
    ids=["causal", "window", "cache", "causal-padding"],
)
@pytest.mark.parametrize("form", ["bool", "inf", "minus-1e9", "2d"])
def test_dense_masks_with_a_pattern_are_applied(queries: int, hidden: torch.Tensor, form: str, rank: int) -> None:
    model = Masked()
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, queries, SIZE, dtype=torch.float64)
    k = torch.randn(BATCH, HEADS, LENGTH, SIZE, dtype=torch.float64)
    mask = {"bool": ~hidden, "inf": additive(hidden, -math.inf), "minus-1e9": additive(hidden, -1e9), "2d": ~hidden}[
        form
    ]
    if rank == 3:
        q, k, mask = q[:, 0], k[:, 0], mask[0]
    if form == "2d":
        mask = mask[0] if rank == 3 else mask[0, 0]
    with gim.GIM(model) as report:
        got = gradient(lambda x: model(x, k, attn_mask=mask), q)
    assert report.complete and report.counts()["attention"] == (1, 1)
    four = (lambda x: x[:, None]) if rank == 3 else (lambda x: x)
    want = gradient(lambda x: attend(four(x), four(k), four(k), hidden, SIZE, eager.PRESETS["GIM"]), q)
    assert_close64(got, want, form, relative=FLOAT64_MODEL_RELATIVE)


BIAS = torch.randn(1, 1, LENGTH, LENGTH, dtype=torch.float64)
HEADWISE = torch.ones(1, HEADS, LENGTH, LENGTH, dtype=torch.bool).tril()
HEADWISE[0, 1] = True
HOLES = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
HOLES[..., 5] = False
PACKED = torch.block_diag(torch.ones(6, 6), torch.ones(7, 7)).bool().tril()[None, None]
UNIFORM = additive(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), -1e9)  # finite: every key weighs the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": BIAS}, "adds numbers of its own to the scores"),
        ({"attn_mask": HEADWISE}, "differs from head to head"),
        ({"attn_mask": HOLES}, "hides keys between keys that it shows"),
        ({"attn_mask": PACKED}, "is neither causal, windowed nor padding"),
        ({"attn_mask": UNIFORM}, "adds numbers of its own to the scores"),
        ({"attn_mask": torch.zeros(1, 1, LENGTH, LENGTH, requires_grad=True)}, "adds numbers of its own"),
        ({"dropout_p": 0.1}, r"was called with dropout_p=0.1: call model.eval\(\)"),
    ],
)
def test_what_attention_cannot_apply_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Masked()

        def forward(self, q: torch.Tensor, k: torch.Tensor, **named: Any) -> torch.Tensor:
            return self.inner(q, k, **named)

    model, q = Outer(), torch.randn(1, HEADS, LENGTH, SIZE, dtype=torch.float64)
    torch.manual_seed(0)
    own = model(q, q, **arguments)
    with gim.GIM(model), pytest.raises(UnsupportedModelError, match=f"inner: .*{message}"):
        model(q, q, **arguments)
    torch.manual_seed(0)
    with gim.GIM(model, strict=False) as report:
        assert torch.equal(model(q, q, **arguments), own)
    assert not report.complete and report.unsupported[0][0] == "inner"


def test_multihead_dropout_and_masked_extra_keys_are_refused() -> None:
    x = inputs()
    for options, named, message in (
        ({"dropout": 0.1}, {}, "has dropout 0.1 in training mode"),
        ({"add_zero_attn": True}, {"key_padding_mask": PADDING}, "add_zero_attn together with a mask"),
        ({}, {"attn_mask": BIAS[0, 0]}, "attn_mask of nn.MultiheadAttention adds numbers of its own"),
    ):
        mha = (
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).double().train(bool("dropout" in options))
        )
        with gim.GIM(mha), pytest.raises(UnsupportedModelError, match=message):
            mha(x, x, x, **named)
