"""What three products of TF32 on tensor cores would cost float32, emulated: the kernels do not use them.

A float32 number is a TF32 number and a rest, which is rounded to another one; the product of the rests is left out.
Where sums are rounded to the nearest number that keeps the budget of errors. Tensor cores cut sums off, and how many
bits they keep before is not documented: with one, the budget does not hold for the widest heads. Only a GPU can tell.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gim_kernels.budget import excess

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest number with 10 bits behind the leading one, as ``cvt.rna.tf32`` rounds."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def one_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products of TF32 numbers are exact in float32, in which they are added up."""
    return tf32(left) @ tf32(right)


def three_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Small terms first."""
    left_rest, right_rest = tf32(left - tf32(left)), tf32(right - tf32(right))
    return left_rest @ tf32(right) + tf32(left) @ right_rest + tf32(left) @ tf32(right)


#: How many products an instruction adds to its sum at a time, and how many bits more than float32 it keeps meanwhile.
TERMS, EXTRA_BITS = 4, 1


def cut_off(x: torch.Tensor, largest: torch.Tensor, bits: int) -> torch.Tensor:
    """``x`` without what lies more than ``bits`` bits below the leading one of ``largest``; float64."""
    unit = torch.exp2(torch.frexp(largest).exponent.double() - bits)
    return torch.trunc(x / unit) * unit


def added(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``total + left @ right`` as tensor cores add: TF32 numbers in float64, in which their products are exact."""
    for start in range(0, left.shape[-1], TERMS):
        inner = slice(start, start + TERMS)
        terms = left[..., inner, None] * right[..., None, inner, :]
        terms = torch.cat([terms, total[..., None, :]], -2)
        total = cut_off(terms, terms.abs().amax(-2, keepdim=True), 24 + EXTRA_BITS).sum(-2)
        total = cut_off(total, total.abs(), 24)
    return total


def three_cut_off(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same three products in one sum that is cut off at every step, as triton compiles them for a tile."""
    big_left, big_right = tf32(left).double(), tf32(right).double()
    left_rest, right_rest = tf32(left - tf32(left)).double(), tf32(right - tf32(right)).double()
    total = torch.zeros(*left.shape[:-1], right.shape[-1], dtype=torch.float64)
    for pair in ((left_rest, big_right), (big_left, right_rest), (big_left, big_right)):
        total = added(total, *pair)
    return total.float()


def step(tensors: tuple[torch.Tensor, ...], scale: float, product: Product) -> dict[str, torch.Tensor]:
    """Causal attention and its gradients at T = 2, written out."""
    query, key, value, grad_out = tensors
    hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    score = (product(query, key.mT.contiguous()) * scale).masked_fill(hidden, float("-inf"))
    weight, soft = torch.softmax(score, -1), torch.softmax(score / 2, -1)
    grad_weight = product(grad_out, value.mT.contiguous())
    grad_score = soft * (grad_weight - (soft * grad_weight).sum(-1, keepdim=True))
    return {
        "out": product(weight, value),
        "query": product(grad_score, key) * scale,
        "key": product(grad_score.mT.contiguous(), query) * scale,
        "value": product(weight.mT.contiguous(), grad_out),
    }


@pytest.mark.parametrize(("size", "tokens", "steep", "mean"), [(64, 128, 1, 0), (128, 256, 16, 0), (64, 256, 4, 5)])
def test_three_products_are_within_the_budget_and_one_is_not(size: int, tokens: int, steep: int, mean: int) -> None:
    generator = torch.Generator().manual_seed(size)
    query, key, value, grad_out = (torch.randn(2, tokens, size, generator=generator) for _ in range(4))
    tensors = (query, key, value + mean, grad_out)
    scale = steep * size**-0.5
    truth = step(tuple(x.double() for x in tensors), scale, torch.matmul)
    yardstick = step(tensors, scale, torch.matmul)
    three, one = step(tensors, scale, three_products), step(tensors, scale, one_product)
    for name in truth:
        assert excess(three[name], truth[name], yardstick[name]) is None, name
        assert excess(one[name], truth[name], yardstick[name]) is not None, name


def test_sums_that_are_cut_off_are_not_within_the_budget() -> None:
    """The widest head, and one tile of 32 keys: what tiles add to one another is rounded to nearest."""
    generator = torch.Generator().manual_seed(2)
    tensors = tuple(torch.randn(8, 32, 256, generator=generator) for _ in range(4))
    scale = 256**-0.5
    truth = step(tuple(x.double() for x in tensors), scale, torch.matmul)
    yardstick = step(tensors, scale, torch.matmul)
    cut, rounded = step(tensors, scale, three_cut_off), step(tensors, scale, three_products)
    assert all(excess(rounded[name], truth[name], yardstick[name]) is None for name in truth)
    assert any(excess(cut[name], truth[name], yardstick[name]) is not None for name in truth)
