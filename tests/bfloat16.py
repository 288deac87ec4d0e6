"""bfloat16 in triton's interpreter, which keeps such numbers as 16-bit integers.

Left alone it multiplies and adds those integers, and a cast from float32 drops bits where a GPU rounds to the nearest,
ties to even. Inside :func:`as_on_a_gpu` it computes as a GPU does: in float32, each result rounded once; a matrix
product of exact factors, summed in the accumulator's type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Array = npt.NDArray[Any]

#: What the interpreter computes with numbers, not with bits. The last operand that is a tensor has the result's type.
ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt", "create_dot")


def widened(bits: Array) -> Array:
    """float32 of bfloat16's bits, exact."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def rounded(numbers: Array) -> Array:
    """The bits of the nearest bfloat16 of float32, of two the even one; NaN stays NaN, and too much is infinite."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, nearest).astype(np.uint16)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _wide(handle: Any) -> Any:
    return interpreter.TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of the interpreter whose operands may be bfloat16."""

    def operation(builder: Any, *operands: Any) -> Any:
        if not any(_is_bfloat16(x) for x in operands):
            return original(builder, *operands)
        result = original(builder, *map(_wide, operands))
        last = [x for x in operands if isinstance(x, interpreter.TensorHandle)][-1]
        if not _is_bfloat16(last) or result.data.dtype == bool:  # a product that sums in float32; a comparison
            return result
        return interpreter.TensorHandle(rounded(result.data), tl.bfloat16)

    return operation


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, the interpreter computes with bfloat16 as a GPU does. A reduction of it, in no known order, raises."""
    builder = interpreter.InterpreterBuilder
    cast, convert = builder.cast_impl, builder.create_fp_to_fp
    check = interpreter.ReduceScanOpInterface.check_tensor

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return interpreter.TensorHandle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return _wide(source) if to.scalar == tl.float32 and _is_bfloat16(source) else cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        nearest = to.scalar == tl.bfloat16 and rounding != ir.ROUNDING_MODE.RTZ
        return cast_impl(self, source, to) if nearest else convert(self, source, to, rounding)

    def check_tensor(self: Any, given: Any) -> None:
        if any(x.dtype.scalar == tl.bfloat16 for x in given):
            raise NotImplementedError("a reduction of bfloat16: cast to float32 first")
        check(self, given)

    with contextlib.ExitStack() as patches:
        for name in ARITHMETIC:
            patches.enter_context(mock.patch.object(builder, name, _arithmetic(getattr(builder, name))))
        patches.enter_context(mock.patch.object(builder, "cast_impl", cast_impl))
        patches.enter_context(mock.patch.object(builder, "create_fp_to_fp", create_fp_to_fp))
        patches.enter_context(mock.patch.object(interpreter.ReduceScanOpInterface, "check_tensor", check_tensor))
        yield
