"""The end of the gradients of key and value where several programs share the query heads of a group."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from gim_kernels.triton import tiles
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.launch import strides
from gim_kernels.triton.primitives import store_rows

#: Numbers that a program holds.
_NUMBERS = 2048


@triton.jit(do_not_specialize=["heads", "keys", "parts"])
def fold_parts_kernel(
    partial_ptr,
    out_ptr,
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_s: tl.int64,
    heads,
    keys,
    parts,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``out[b, h, s] = sum over parts of partial[part, b, h, s]``, one part after another, in float32.

    One program per tile of keys and head.
    """
    tiles_s = tl.cdiv(keys, BLOCK_ROWS)
    start = tl.program_id(0) % tiles_s * BLOCK_ROWS
    batch_head = (tl.program_id(0) // tiles_s).to(tl.int64)
    # [BLOCK_ROWS, 1]
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    # [1, BLOCK_COLUMNS]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (start + row < keys) & (column < HEAD_SIZE)
    part_numbers = (tl.num_programs(0) // tiles_s).to(tl.int64) * keys * HEAD_SIZE
    partial_ptr += (batch_head * keys + start) * HEAD_SIZE
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for part in range(parts):
        total += tl.load(partial_ptr + part * part_numbers + (row * HEAD_SIZE + column), mask=mask, other=0.0)
    out_ptr += batch_head // heads * out_stride_b + batch_head % heads * out_stride_h
    store_rows(out_ptr, total, start, out_stride_s, keys, BLOCK_ROWS, HEAD_SIZE, BLOCK_COLUMNS)


@functools.cache
def fold_parts_variant(dtype: torch.dtype, head_size: int) -> tiles.Variant:
    """The fold into gradients of ``dtype``; see :class:`gim_kernels.triton.tiles.Variant`."""
    padded = tiles.padded_head(head_size)
    constants = {"HEAD_SIZE": head_size, "BLOCK_ROWS": _NUMBERS // padded, "BLOCK_COLUMNS": padded}
    short = tiles.TRITON_TYPES[dtype]
    signature = {
        "partial_ptr": "*fp32",
        "out_ptr": f"*{short}",
        **dict.fromkeys(("out_stride_b", "out_stride_h", "out_stride_s"), "i64"),
        **dict.fromkeys(("heads", "keys", "parts"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    wide = ("out_stride_b", "out_stride_h", "out_stride_s") if head_size % 16 == 0 else ()
    divisible = ("partial_ptr", "out_ptr", *wide)
    return tiles.Variant(
        f"gim_fold_parts_{short}_d{head_size}", fold_parts_kernel, signature, constants, divisible, 4, 1
    )


@Plans
def fold_plans(tensors: tuple[torch.Tensor, torch.Tensor]) -> Launch:
    """The launch that :func:`fold_parts` needs."""
    partial, out = tensors
    batch, heads, keys, size = out.shape
    variant = fold_parts_variant(out.dtype, size)
    return Launch(
        variant,
        triton.cdiv(keys, variant.constants["BLOCK_ROWS"]) * batch * heads,
        **strides("out", out, "s"),
        heads=heads,
        keys=keys,
        parts=partial.shape[0],
    )


def fold_parts(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of ``partial`` over its first dimension to ``out``.

    Args:
        partial: ``[parts, B, HK, S, D]``, contiguous, float32.
        out: ``[B, HK, S, D]`` with unit stride in a row; its dtype is the result's.
    """
    fold_plans((partial, out))(partial, out)
