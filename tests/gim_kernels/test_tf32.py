"""What three products of TF32 on tensor cores would cost float32, emulated: the kernels do not use them.

A float32 number is a TF32 number and a rest, which is rounded to another one; the product of the rests is left out.
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
