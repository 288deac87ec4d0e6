"""What makes triton's interpreter sooner changes no number and leaves no check out: held against it as it comes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from gim_kernels.triton import device
from tests.interpreter import AS_IT_COMES, without_repetition

pytestmark = pytest.mark.skipif(not device.interpreted(), reason="is about triton's interpreter")


@triton.jit
def scaled(x: Any, factor: Any) -> Any:
    return x * factor + tl.sum(x, 0)


@triton.jit
def kernel(x_ptr: Any, out_ptr: Any, factor: Any, block: tl.constexpr) -> None:
    """Functions of this module and of triton's, each of which patches the language again."""
    i = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, scaled(scaled(x, factor), factor) + tl.max(x, 0))


@triton.jit
def combined(x: Any, y: Any, operation: tl.constexpr) -> Any:
    if operation == "add":
        return x + y
    return x - y if operation == "sub" else x * y


@triton.jit
def whole_kernel(x_ptr: Any, y_ptr: Any, out_ptr: Any, operation: tl.constexpr, block: tl.constexpr) -> None:
    i = tl.arange(0, block)
    tl.store(out_ptr + i, combined(tl.load(x_ptr + i), tl.load(y_ptr + i), operation))


@contextlib.contextmanager
def as_it_comes() -> Iterator[None]:
    """Inside, the interpreter is as it is outside of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, original in AS_IT_COMES:
            patch.setattr(owner, name, original)
        yield


@pytest.mark.parametrize("how", [as_it_comes, without_repetition])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32, torch.int64])
def test_numbers(how: Callable[[], Any], dtype: torch.dtype) -> None:
    x = torch.arange(-13, 19).to(dtype)
    found = torch.zeros_like(x)
    with how():
        for _ in range(2):  # the second launch finds the language restored by the first
            kernel[(2,)](x, found, 2, block=16)
    rows = x.view(2, 16).double()
    once = rows * 2 + rows.sum(1, keepdim=True)
    want = once * 2 + once.sum(1, keepdim=True) + rows.amax(1, keepdim=True)
    assert torch.equal(found.double(), want.flatten())


LOW, HIGH = -(2**31), 2**31 - 1
#: Two numbers, and whether int32 holds what comes of them.
WHOLE = {
    "add": [(HIGH, 1, False), (HIGH, 0, True), (LOW, -1, False), (LOW, HIGH, True)],
    "sub": [(LOW, 1, False), (LOW, 0, True), (HIGH, -1, False), (HIGH, HIGH, True)],
    "mul": [(2**16, 2**15, False), (2**16, -(2**15), True), (LOW, -1, False), (46340, 46340, True)],
}


@pytest.mark.parametrize("operation", WHOLE)
def test_a_number_that_overflows_is_an_error(operation: str) -> None:
    for first, second, fits in WHOLE[operation]:
        x, y = (torch.tensor([1, number], dtype=torch.int32) for number in (first, second))
        found = torch.zeros_like(x)
        with contextlib.nullcontext() if fits else pytest.raises(Exception, match=f"int32 overflow .*{operation}"):
            whole_kernel[(1,)](x, y, found, operation=operation, block=2)
        if fits:
            exact = {"add": first + second, "sub": first - second, "mul": first * second}
            assert found[1] == exact[operation]
        whole_kernel[(1,)](torch.ones_like(x), y, found, operation="add", block=1)  # what failed left nothing behind
        assert found[0] == 2
        with pytest.raises(ValueError, match="forget to add @triton.jit"):
            tl.arange(0, 4)


def test_the_interpreter_is_left_as_it_was() -> None:
    with as_it_comes():
        with without_repetition():
            assert all(getattr(owner, name) is not original for owner, name, original in AS_IT_COMES)
        assert all(getattr(owner, name) is original for owner, name, original in AS_IT_COMES)
