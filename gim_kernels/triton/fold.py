"""Partial sums of several programs, added in one fixed order: what atomics would do in another order every time."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from gim_kernels.triton.pointwise_tiles import FOLD, Tile, pointwise_variant
from gim_kernels.triton.tiles import Variant


@triton.jit
def fold_kernel(
    partial_ptr,
    out_ptr,
    chunks: tl.int32,
    columns: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``out[j] = sum over chunks c of partial[c, j]``, in float32 and in one fixed order, then in out's dtype."""
    # [1, BLOCK_COLUMNS]
    column = (tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    column_mask = column < columns
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, chunks, BLOCK_ROWS):
        # [BLOCK_ROWS, 1]
        chunk = (start + tl.arange(0, BLOCK_ROWS))[:, None]
        mask = (chunk < chunks) & column_mask
        total += tl.load(partial_ptr + chunk.to(tl.int64) * columns + column, mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0, keep_dims=True).to(out_ptr.dtype.element_ty), mask=column_mask)


@functools.cache
def fold_variant(dtype: torch.dtype = torch.float32, tile: Tile = FOLD) -> Variant:
    """The kernel that adds partial sums into an output of ``dtype``; a tile of one row adds them one after another."""
    return pointwise_variant("fold", fold_kernel, tile, {"partial_ptr": torch.float32, "out_ptr": dtype}, True, {})


def fold(partial: torch.Tensor, out: torch.Tensor, tile: Tile = FOLD) -> None:
    """Write the sum of ``partial`` over its first dimension to ``out``.

    Args:
        partial: ``[chunks, columns]``, contiguous, float32.
        out: ``columns`` numbers next to each other in memory, whatever its shape; its dtype is the result's.
        tile: rows and columns that a program reads at once.
    """
    chunks, columns = partial.shape
    fold_variant(out.dtype, tile).launch(
        triton.cdiv(columns, tile.columns), partial_ptr=partial, out_ptr=out, chunks=chunks, columns=columns
    )
