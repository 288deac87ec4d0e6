"""Attention within documents of one row: against the formula, and how much is run for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gim.intercept.attention import attend
from gim.intercept.documents import SHORT, attend_within
from gim.intercept.masks import KeyPattern

HEADS, KEY_HEADS, SIZE = 4, 2, 8
TEMPERATURE = 2.0
OPTIONS: dict[str, Any] = {
    "softmax_backward": "temperature",
    "temperature": TEMPERATURE,
    "grad_scale": (0.5, 0.25, 1.0),
    "engine": "blockwise",
}


def starts_of(lengths: list[int]) -> tuple[int, ...]:
    return tuple(sum(lengths[:i]) for i in range(len(lengths)))


def tensors(batch: int, tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    made = [torch.randn(batch, tokens, heads, SIZE, dtype=torch.float64) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def by_formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """Attention where a query sees keys ``[B, T, S]``; its gradients are those of the temperature, of scaled parts."""
    scaled = [
        x * factor + (x * (1 - factor)).detach()
        for x, factor in zip((query, key, value), (0.5, 0.25, 1.0), strict=True)
    ]
    query, key, value = scaled
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    scores = (query @ key.mT / math.sqrt(SIZE)).masked_fill(~sees[:, None], -torch.inf)
    plain, soft = (torch.softmax(scores / t, -1).nan_to_num(0.0) for t in (1.0, TEMPERATURE))
    # The gradient of softmax(S / T) without the factor 1 / T, beside the value of softmax(S).
    weights = plain.detach() + TEMPERATURE * (soft - soft.detach())
    return weights @ value


def seen(lengths: list[int], pattern: KeyPattern, batch: int) -> torch.Tensor:
    tokens = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(tokens)
    sees = document[:, None] == document
    if pattern.causal:
        sees = sees & (at[:, None] >= at)
    if pattern.window is not None:
        sees = sees & (at[:, None] - at < pattern.window)
    if pattern.reach is not None:
        sees = sees & ((at[:, None] - at).abs() <= pattern.reach)
    sees = sees.expand(batch, -1, -1)
    if pattern.key_range is not None:
        low, high = pattern.key_range.T
        sees = sees & (at >= low[:, None, None]) & (at < high[:, None, None])
    return sees


def assert_formula(
    lengths: list[int], batch: int, causal: bool, near: int | None, hidden: tuple[int, int] | None
) -> None:
    tokens = sum(lengths)
    key_range = None
    if hidden is not None:
        key_range = torch.tensor([[hidden[0] * b, tokens - hidden[1] * b] for b in range(batch)], dtype=torch.int32)
    window, reach = (near, None) if causal else (None, near)
    pattern = KeyPattern(tokens, tokens, causal, window, key_range, reach, documents=(starts_of(lengths),))
    inputs = query, key, value = tensors(batch, tokens)
    out = attend(query, key, value, pattern, **OPTIONS)
    want = by_formula(query, key, value, seen(lengths, pattern, batch))
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-11)
    seed = torch.randn_like(want)
    for got, right in zip(torch.autograd.grad(out, inputs, seed), torch.autograd.grad(want, inputs, seed), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    batch=st.integers(1, 3),
    causal=st.booleans(),
    near=st.none() | st.integers(1, 12),
    hidden=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_documents_see_themselves(
    lengths: list[int], batch: int, causal: bool, near: int | None, hidden: tuple[int, int] | None
) -> None:
    assert_formula(lengths, batch, causal, near, hidden)


@pytest.mark.parametrize("lengths", [[600, 3, 520, 5, 1], [SHORT, SHORT + 1, SHORT - 1, 1, 1, 2, 3]])
def test_long_documents_between_short_ones(lengths: list[int]) -> None:
    assert_formula(lengths, 1, True, None, None)


def test_rows_whose_documents_differ() -> None:
    rows = [[3, 5, 8], [9, 7]]
    pattern = KeyPattern(16, 16, True, None, None, documents=tuple(map(starts_of, rows)))
    query, key, value = tensors(2, 16)
    sees = torch.cat([seen(lengths, pattern, 1) for lengths in rows])
    out, want = attend(query, key, value, pattern, **OPTIONS), by_formula(query, key, value, sees)
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lengths", [[5] * 64, list(range(1, 65)), [1, 700, 3, 700, 1500, 2, 2, 1]])
def test_calls_and_copies(lengths: list[int]) -> None:
    """Calls are as many as lengths have numbers of digits, and one for each long document; copies less than twice."""
    tokens = sum(lengths)
    ran: list[tuple[int, int]] = []

    def shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern, /) -> torch.Tensor:
        ran.append((query.shape[0], query.shape[2]))
        if query.shape[2] > SHORT:  # read where it is
            assert query.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        return query

    whole, key, value = tensors(1, tokens)
    pattern = KeyPattern(tokens, tokens, True, None, None)
    assert torch.equal(attend_within(whole, key, value, pattern, starts_of(lengths), shape), whole)
    long = [length for length in lengths if length > SHORT]
    assert len(ran) <= len(long) + math.log2(SHORT) + 1
    assert sorted(length for _, length in ran if length > SHORT) == sorted(long)
    assert sum(count * length for count, length in ran) < 2 * tokens
