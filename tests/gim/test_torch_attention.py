"""Every way in which torch's function of attention may be called: the rules are those of the same call written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gim
from gim.rules import Rules, get
from gim_kernels.reference import attention_weights, scale_gradient
from tests.gim_kernels.test_attention_arguments import BROADCAST
from tests.oracle import assert_close64

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

    def written_out(self, x: torch.Tensor, rules: Rules) -> torch.Tensor:
        inputs = ((x @ one).reshape(shape) for one, shape in zip(self.maps, self.shapes, strict=True))
        q, k, v = (scale_gradient(one, by) for one, by in zip(inputs, rules.qkv_scale, strict=True))
        if self.given.get("enable_gqa"):
            k, v = (one.repeat_interleave(q.shape[-3] // one.shape[-3], -3) for one in (k, v))
        scores = q @ k.mT * self.given.get("scale", q.shape[-1] ** -0.5)
        mask = self.given.get("attn_mask")
        if self.given.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return attention_weights(scores, rules.softmax, rules.temperature) @ v


def check(shapes: Any, engine: Any = "auto", **given: Any) -> None:
    model, x = Attending(shapes, given), torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    own = model(x)
    for rules in ("GIM", "GIM_CONSTANT", "GRADIENT"):
        with gim.GIM(model, rules=rules, engine=engine) as report:
            out = model(x)
        assert report.complete and report.counts()["attention"] == (1, 1)
        assert_close64(out, own.nan_to_num(), f"{rules} output")
        want = model.written_out(x, get(rules))
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


@pytest.mark.parametrize("engine", ["blockwise", "composed", "reference"])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 3, 6])
@pytest.mark.parametrize("added", [False, True], ids=["boolean", "added"])
def test_a_static_cache(added: bool, start: int, window: int | None, engine: str) -> None:
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
