"""Triton's interpreter computes with bfloat16 as a GPU does: held against torch's own bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from gim_kernels.triton import device
from tests.bfloat16 import as_on_a_gpu

pytestmark = pytest.mark.skipif(not device.interpreted(), reason="is about triton's interpreter")


@triton.jit
def cast_kernel(x_ptr: Any, y_ptr: Any, block: tl.constexpr) -> None:
    i = tl.arange(0, block)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def product_kernel(x_ptr: Any, y_ptr: Any, sum_ptr: Any, block: tl.constexpr) -> None:
    """``sum + x y`` of square matrices."""
    i = tl.arange(0, block)[:, None] * block + tl.arange(0, block)[None, :]
    tl.store(sum_ptr + i, tl.dot(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(sum_ptr + i), input_precision="ieee"))


@triton.jit
def arithmetic_kernel(x_ptr: Any, y_ptr: Any, out_ptr: Any, block: tl.constexpr) -> None:
    """``x y + x``, or ``-x`` where ``x < y``, each step in the dtype of the matrices."""
    i = tl.arange(0, block)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.where(x < y, -x, x * y + x))


@triton.jit
def sum_kernel(x_ptr: Any, y_ptr: Any, block: tl.constexpr) -> None:
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, block)), 0))


def test_a_cast_rounds_to_the_nearest_and_of_two_to_the_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).int()
    bits[:2048] &= ~0xFFFF
    bits[:2048] |= torch.tensor([0x7FFF, 0x8000, 0x8001, 0], dtype=torch.int32).repeat(512)  # ties and their neighbours
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-40])
    for x in (bits.view(torch.float32), special):
        found = torch.zeros(x.shape, dtype=torch.bfloat16)
        cast_kernel[(1,)](x, found, block=x.numel())
        torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_cast_to_a_wider_type_is_exact(dtype: torch.dtype) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.zeros(256, dtype=dtype)
    cast_kernel[(1,)](x, found, block=256)
    assert torch.equal(found, x.to(dtype))


def test_a_matrix_product_is_of_the_numbers_and_sums_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    # Whole numbers, whose products and sums float32 holds exactly and bfloat16 does not.
    x, y, total = (torch.randint(-99, 100, (32, 32), generator=generator).float() for _ in range(3))
    want = total + x @ y
    product_kernel[(1,)](x.bfloat16(), y.bfloat16(), total, block=32)
    assert torch.equal(total, want) and not torch.equal(want.bfloat16().float(), want)


def test_every_step_of_arithmetic_is_rounded() -> None:
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = torch.zeros(1024, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, found, block=1024)
    assert torch.equal(found, torch.where(x < y, -x, x * y + x))


def test_a_reduction_is_refused_not_guessed() -> None:
    with pytest.raises(Exception, match="a reduction of bfloat16: cast to float32 first"):
        sum_kernel[(1,)](torch.ones(8).bfloat16(), torch.zeros(1).bfloat16(), block=8)


def test_the_interpreter_is_left_as_it_was() -> None:
    from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface

    before = dict(vars(InterpreterBuilder)), dict(vars(ReduceScanOpInterface))
    with as_on_a_gpu():
        assert vars(InterpreterBuilder) != before[0] and vars(ReduceScanOpInterface) != before[1]
    assert (dict(vars(InterpreterBuilder)), dict(vars(ReduceScanOpInterface))) == before
