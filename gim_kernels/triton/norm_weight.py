"""The gradients of a norm's weight and bias on a GPU: sums over rows, by chunks that are then folded."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gim_kernels.triton.device import guard
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.pointwise_tiles import FOLD, WEIGHT_GRADIENT, pointwise_variant, rows_per_chunk
from gim_kernels.triton.rows import as_rows, row_offset
from gim_kernels.triton.tiles import Variant


@triton.jit(do_not_specialize=["rows", "size1", "size2", "rows_per_chunk"])
def norm_backward_weight_kernel(
    grad_y_ptr,
    x_ptr,
    mean_ptr,
    inverse_ptr,
    partial_weight_ptr,
    partial_bias_ptr,
    rows: tl.int32,
    columns: tl.int32,
    size1,
    size2,
    grad_y_stride0,
    grad_y_stride1,
    grad_y_stride2,
    x_stride0,
    x_stride1,
    x_stride2,
    rows_per_chunk: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sums over one chunk of rows: ``partial_weight = sum(grad_y * n)``, ``partial_bias = sum(grad_y)``.

    A sum whose pointer is None is left out. The chunks depend on the shape alone and are folded in order by
    :func:`fold_kernel`: no atomics, and the same bits every time.
    """
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    chunk = tl.program_id(0) // column_blocks
    # [1, BLOCK_COLUMNS]
    column = (tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    column_mask = column < columns
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    sum_product = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    sum_grad = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    first = chunk * rows_per_chunk
    for start in range(first, tl.minimum(first + rows_per_chunk, rows), BLOCK_ROWS):
        # [BLOCK_ROWS, 1]
        row = (start + tl.arange(0, BLOCK_ROWS))[:, None]
        row_mask = row < rows
        mask = row_mask & column_mask
        grad_offset = row_offset(row, size1, size2, grad_y_stride0, grad_y_stride1, grad_y_stride2)
        grad = tl.load(grad_y_ptr + grad_offset + column, mask=mask, other=0.0).to(tl.float32)
        if partial_weight_ptr is not None:
            x_offset = row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
            x = tl.load(x_ptr + x_offset + column, mask=mask, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                x = x - tl.load(mean_ptr + row, mask=row_mask, other=0.0)
            sum_product += grad * (x * tl.load(inverse_ptr + row, mask=row_mask, other=0.0))
        if partial_bias_ptr is not None:
            sum_grad += grad
    offset = chunk.to(tl.int64) * columns + column
    if partial_weight_ptr is not None:
        tl.store(partial_weight_ptr + offset, tl.sum(sum_product, axis=0, keep_dims=True), mask=column_mask)
    if partial_bias_ptr is not None:
        tl.store(partial_bias_ptr + offset, tl.sum(sum_grad, axis=0, keep_dims=True), mask=column_mask)


@triton.jit(do_not_specialize=["chunks"])
def fold_kernel(
    partial_ptr,
    out_ptr,
    chunks: tl.int32,
    columns: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``out[j] = sum over chunks c of partial[c, j]``, float32, in one fixed order."""
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
    tl.store(out_ptr + column, tl.sum(total, axis=0, keep_dims=True), mask=column_mask)


@functools.cache
def backward_weight_variant(
    grad: torch.dtype, x: torch.dtype | None, need_bias: bool, centre: bool, merged: bool
) -> Variant:
    """The kernel of the weight's and the bias's partial sums; of the bias's alone where ``x`` is None."""
    return pointwise_variant(
        f"{'layer' if centre else 'rms'}_norm_backward_weight",
        norm_backward_weight_kernel,
        WEIGHT_GRADIENT,
        {
            "grad_y_ptr": grad,
            "x_ptr": x,
            "mean_ptr": torch.float32 if centre and x is not None else None,
            "inverse_ptr": None if x is None else torch.float32,
            "partial_weight_ptr": None if x is None else torch.float32,
            "partial_bias_ptr": torch.float32 if need_bias else None,
        },
        merged,
        {},
    )


@functools.cache
def fold_variant() -> Variant:
    """The kernel that adds the partial sums."""
    return pointwise_variant(
        "fold", fold_kernel, FOLD, {"partial_ptr": torch.float32, "out_ptr": torch.float32}, True, {}
    )


class _Sums(NamedTuple):
    """The launch of the sums over chunks, that of their fold, how many chunks there are, and whether grad_y or x must
    become contiguous for the first, which :func:`as_rows` does."""

    over_chunks: Launch
    fold: Launch
    chunks: int
    copies: bool


@Plans
def weight_plans(tensors: tuple[torch.Tensor, ...], need_bias: bool, centre: bool) -> _Sums:
    """The plan for grad_y and x, or None without the weight's gradient."""
    grad_y, x = tensors
    rows, walked = as_rows(grad_y, x)
    each = rows_per_chunk(rows.count, rows.columns)
    chunks = triton.cdiv(rows.count, each)
    over_chunks = Launch(
        backward_weight_variant(grad_y.dtype, None if x is None else x.dtype, need_bias, centre, rows.merged),
        chunks * triton.cdiv(rows.columns, WEIGHT_GRADIENT.columns),
        **rows.arguments("grad_y", "x"),
        rows_per_chunk=each,
    )
    fold = Launch(fold_variant(), triton.cdiv(rows.columns, FOLD.columns), chunks=chunks, columns=rows.columns)
    return _Sums(over_chunks, fold, chunks, walked[0] is not grad_y or walked[1] is not x)


def weight_gradients(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``sum(grad_y * n)`` over the rows, None without ``x``, and ``sum(grad_y)``; float32 ``[D]``."""
    columns = grad_y.shape[-1]
    grads = [inverse.new_zeros(columns) if need else None for need in (x is not None, need_bias)]
    if grad_y.numel() == 0:
        return grads[0], grads[1]
    plan = weight_plans((grad_y, x), need_bias, mean is not None)
    partials = [None if total is None else inverse.new_empty((plan.chunks, columns)) for total in grads]
    grad, x = as_rows(grad_y, x)[1] if plan.copies else (grad_y, x)
    statistics = (None, None) if x is None else (mean, inverse)
    with guard(grad_y):
        plan.over_chunks(grad, x, *statistics, *partials)
        for partial, total in zip(partials, grads, strict=True):
            if total is not None:
                plan.fold(partial, total)
    return grads[0], grads[1]
