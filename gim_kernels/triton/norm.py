"""RMS norm and layer norm on a GPU: forward, and a backward whose statistic may be a constant."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gim_kernels.told import tell
from gim_kernels.triton.device import check, guard
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.norm_weight import weight_gradients
from gim_kernels.triton.pointwise_tiles import Tile, norm_tile, pointwise_variant
from gim_kernels.triton.rows import as_rows, contiguous, row_offset
from gim_kernels.triton.tiles import Variant


@triton.jit
def _times_weight(value, weight_ptr, weight_offset, column, mask):
    """``value * (weight + weight_offset)`` for the columns of a tile, in float32; ``value`` without a weight."""
    if weight_ptr is not None:
        value = value * (tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32) + weight_offset)
    return value


@triton.jit
def _plus_bias(value, bias_ptr, column, mask):
    """``value + bias`` for the columns of a tile, in float32; ``value`` without a bias."""
    if bias_ptr is not None:
        value = value + tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    inverse_ptr,
    rows: tl.int32,
    columns: tl.int32,
    size1,
    size2,
    x_stride0,
    x_stride1,
    x_stride2,
    eps: tl.float32,
    weight_offset: tl.float32,
    ONE_PASS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``y = (x - mean) * inverse * (weight + weight_offset) + bias``, ``inverse = 1 / sqrt(var + eps)``.

    Without ``mean_ptr`` the mean is 0, and ``var = mean(x^2)``. Sums run over ``x - shift``, the shift being the mean
    of the first block of columns, and ``var = mean((x - shift)^2) - (mean - shift)^2``: as that block is a part of the
    row, the difference is smaller than its terms by no more than the number of blocks.
    """
    # [BLOCK_ROWS, 1]
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    row_mask = row < rows
    x_row_ptr = x_ptr + row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    y_row_ptr = y_ptr + row.to(tl.int64) * columns

    # [1, BLOCK_COLUMNS]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    mask = row_mask & (column < columns)
    x = tl.load(x_row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    # [BLOCK_ROWS, 1]
    shift = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if mean_ptr is not None:
        shift = tl.sum(x, axis=1, keep_dims=True) / tl.minimum(columns * 1.0, BLOCK_COLUMNS * 1.0)
        x = tl.where(mask, x - shift, 0.0)
    squares = tl.sum(x * x, axis=1, keep_dims=True)
    away = tl.zeros([BLOCK_ROWS, 1], tl.float32)  # mean - shift
    if not ONE_PASS:
        if mean_ptr is not None:
            away = tl.sum(x, axis=1, keep_dims=True)
        for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
            here = start + column
            mask = row_mask & (here < columns)
            block = tl.load(x_row_ptr + here, mask=mask, other=0.0).to(tl.float32)
            if mean_ptr is not None:
                block = tl.where(mask, block - shift, 0.0)
                away += tl.sum(block, axis=1, keep_dims=True)
            squares += tl.sum(block * block, axis=1, keep_dims=True)
        away = away / columns
        squares = tl.maximum(squares - away * away * columns, 0.0)

    inverse = tl.rsqrt(squares / columns + eps)
    tl.store(inverse_ptr + row, inverse, mask=row_mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, shift + away, mask=row_mask)

    if ONE_PASS:
        column_mask = column < columns
        y = _times_weight(x * inverse, weight_ptr, weight_offset, column, column_mask)
        y = _plus_bias(y, bias_ptr, column, column_mask)
        tl.store(y_row_ptr + column, y.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)
    else:
        for start in range(0, columns, BLOCK_COLUMNS):
            here = start + column
            column_mask = here < columns
            mask = row_mask & column_mask
            block = tl.load(x_row_ptr + here, mask=mask, other=0.0).to(tl.float32)
            y = _times_weight((block - shift - away) * inverse, weight_ptr, weight_offset, here, column_mask)
            y = _plus_bias(y, bias_ptr, here, column_mask)
            tl.store(y_row_ptr + here, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_and_input(
    grad_row_ptr,
    x_row_ptr,
    weight_ptr,
    weight_offset,
    mean,
    inverse,
    column,
    columns,
    row_mask,
):
    """``g = grad_y * (weight + weight_offset)`` and ``n = (x - mean) * inverse`` of a tile; n = 0 without ``x``."""
    column_mask = column < columns
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    mask = row_mask & column_mask
    grad = tl.load(grad_row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    grad = _times_weight(grad, weight_ptr, weight_offset, column, column_mask)
    normalised = tl.zeros_like(grad)
    if x_row_ptr is not None:
        x = tl.load(x_row_ptr + column, mask=mask, other=0.0).to(tl.float32)
        # Columns past the end hold -mean here; their g is 0, and so is their part of every sum.
        normalised = (x - mean) * inverse
    return grad, normalised


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def norm_backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    inverse_ptr,
    grad_x_ptr,
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
    weight_offset: tl.float32,
    CENTRE: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``grad_x = inverse * (g - rowmean(g) - n * rowmean(g * n))``, ``g = grad_y * (weight + weight_offset)``.

    ``n = (x - mean) * inverse``. Without ``x_ptr`` the statistic is a constant and the last term is dropped; without
    ``CENTRE`` there is no mean and no second term.
    """
    # [BLOCK_ROWS, 1]
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    row_mask = row < rows
    grad_row_ptr = grad_y_ptr + row_offset(row, size1, size2, grad_y_stride0, grad_y_stride1, grad_y_stride2)
    x_row_ptr = None
    if x_ptr is not None:
        x_row_ptr = x_ptr + row_offset(row, size1, size2, x_stride0, x_stride1, x_stride2)
    grad_x_row_ptr = grad_x_ptr + row.to(tl.int64) * columns
    inverse = tl.load(inverse_ptr + row, mask=row_mask, other=0.0)
    mean = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if mean_ptr is not None:
        mean += tl.load(mean_ptr + row, mask=row_mask, other=0.0)

    # [1, BLOCK_COLUMNS]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    grad, normalised = _gradient_and_input(
        grad_row_ptr,
        x_row_ptr,
        weight_ptr,
        weight_offset,
        mean,
        inverse,
        column,
        columns,
        row_mask,
    )
    # [BLOCK_ROWS, 1]
    mean_grad = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    mean_product = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if CENTRE:
        mean_grad += tl.sum(grad, axis=1, keep_dims=True)
    if x_ptr is not None:
        mean_product += tl.sum(grad * normalised, axis=1, keep_dims=True)
    if not ONE_PASS and (CENTRE or x_ptr is not None):
        for start in range(BLOCK_COLUMNS, columns, BLOCK_COLUMNS):
            block, block_normalised = _gradient_and_input(
                grad_row_ptr,
                x_row_ptr,
                weight_ptr,
                weight_offset,
                mean,
                inverse,
                start + column,
                columns,
                row_mask,
            )
            if CENTRE:
                mean_grad += tl.sum(block, axis=1, keep_dims=True)
            if x_ptr is not None:
                mean_product += tl.sum(block * block_normalised, axis=1, keep_dims=True)
    mean_grad = mean_grad / columns
    mean_product = mean_product / columns

    if ONE_PASS:
        grad_x = (grad - mean_grad - normalised * mean_product) * inverse
        tl.store(
            grad_x_row_ptr + column,
            grad_x.to(grad_x_ptr.dtype.element_ty),
            mask=row_mask & (column < columns),
        )
    else:
        for start in range(0, columns, BLOCK_COLUMNS):
            here = start + column
            block, block_normalised = _gradient_and_input(
                grad_row_ptr,
                x_row_ptr,
                weight_ptr,
                weight_offset,
                mean,
                inverse,
                here,
                columns,
                row_mask,
            )
            grad_x = (block - mean_grad - block_normalised * mean_product) * inverse
            tl.store(
                grad_x_row_ptr + here,
                grad_x.to(grad_x_ptr.dtype.element_ty),
                mask=row_mask & (here < columns),
            )


@functools.cache
def forward_variant(
    tile: Tile,
    dtype: torch.dtype,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    centre: bool,
    merged: bool,
) -> Variant:
    """The kernel of a norm's forward.

    Args:
        tile: from :func:`gim_kernels.triton.pointwise_tiles.norm_tile`.
        dtype: of the input and the output.
        weight, bias: their dtypes, None where absent.
        centre: whether the mean is subtracted: a layer norm.
        merged: whether the input's rows need one stride only.
    """
    return pointwise_variant(
        "layer_norm_forward" if centre else "rms_norm_forward",
        norm_forward_kernel,
        tile,
        {
            "x_ptr": dtype,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": dtype,
            "mean_ptr": torch.float32 if centre else None,
            "inverse_ptr": torch.float32,
        },
        merged,
        {"ONE_PASS": tile.one_pass},
    )


@functools.cache
def backward_variant(
    tile: Tile,
    grad: torch.dtype,
    x: torch.dtype | None,
    weight: torch.dtype | None,
    centre: bool,
    merged: bool,
) -> Variant:
    """The kernel of the input's gradient, with a constant statistic where ``x`` is None; else as the forward."""
    return pointwise_variant(
        f"{'layer' if centre else 'rms'}_norm_backward_{'frozen' if x is None else 'live'}",
        norm_backward_kernel,
        tile,
        {
            "grad_y_ptr": grad,
            "x_ptr": x,
            "weight_ptr": weight,
            "mean_ptr": torch.float32 if centre and x is not None else None,
            "inverse_ptr": torch.float32,
            "grad_x_ptr": grad,
        },
        merged,
        {"CENTRE": centre, "ONE_PASS": tile.one_pass},
    )


def _dtype(x: torch.Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


class _Rows(NamedTuple):
    """A launch over rows, and whether some tensor must become contiguous for it, which :func:`as_rows` does."""

    launch: Launch
    copies: bool


@Plans
def forward_plans(tensors: tuple[torch.Tensor, ...], eps: float, weight_offset: float, centre: bool) -> _Rows | None:
    """The forward for x, weight and bias; None where there is nothing to compute."""
    x, weight, bias = tensors
    check(x=x, weight=weight, bias=bias)
    if x.numel() == 0:
        return None
    rows, (walked,) = as_rows(x)
    tile = norm_tile(rows.columns)
    launch = Launch(
        forward_variant(tile, x.dtype, _dtype(weight), _dtype(bias), centre, rows.merged),
        triton.cdiv(rows.count, tile.rows),
        **rows.arguments("x"),
        eps=eps,
        weight_offset=weight_offset,
    )
    return _Rows(launch, walked is not x)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    centre: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``y``, the inverse statistics and, with ``centre``, the means."""
    plan = forward_plans((x, weight, bias), eps, weight_offset, centre)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    mean = torch.empty_like(inverse) if centre else None
    if plan is not None:
        walked = as_rows(x)[1][0] if plan.copies else x
        with guard(x):
            plan.launch(walked, contiguous(weight), contiguous(bias), y, mean, inverse)
    return y, inverse, mean


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :class:`gim_kernels.types.PointwiseEngine`; float32, float16 or bfloat16.

    Where the last dimension has stride 1, x is read by its strides.

    Raises:
        TypeError, RuntimeError: tensors the kernels cannot take; see :func:`gim_kernels.triton.device.check`.

    Numerics: float32, rounded once; deterministic.
    """
    tell("triton")
    y, inverse, _ = _forward(x, weight, None, eps, weight_offset, centre=False)
    return y, inverse


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :class:`gim_kernels.types.PointwiseEngine`; float32, float16 or bfloat16.

    Where the last dimension has stride 1, x is read by its strides.

    Raises:
        TypeError, RuntimeError: tensors the kernels cannot take; see :func:`gim_kernels.triton.device.check`.

    Numerics: float32, the variance of centred values, rounded once; deterministic.
    """
    tell("triton")
    y, inverse, mean = _forward(x, weight, bias, eps, 0.0, centre=True)
    assert mean is not None
    return y, mean, inverse


@Plans
def backward_plans(tensors: tuple[torch.Tensor, ...], weight_offset: float, centre: bool) -> _Rows:
    """The gradient of the input for grad_y, x (None where the statistic is a constant) and weight."""
    grad_y, x, weight = tensors
    rows, walked = as_rows(grad_y, x)
    tile = norm_tile(rows.columns)
    launch = Launch(
        backward_variant(tile, grad_y.dtype, _dtype(x), _dtype(weight), centre, rows.merged),
        triton.cdiv(rows.count, tile.rows),
        **rows.arguments("grad_y", "x"),
        weight_offset=weight_offset,
    )
    return _Rows(launch, walked[0] is not grad_y or walked[1] is not x)


def norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    weight_offset: float,
    *,
    frozen: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """See :class:`gim_kernels.types.PointwiseEngine`.

    Raises:
        TypeError, RuntimeError: tensors the kernels cannot take; see :func:`gim_kernels.triton.device.check`.

    Numerics: float32, rounded once. The weight's sums run over chunks of rows that depend on the shape alone, and the
    chunks are added in order: deterministic.
    """
    check(grad_y=grad_y, x=x, weight=weight)
    need_x, need_weight, need_bias = needs
    inverse, mean = inverse.contiguous(), contiguous(mean)
    grad_x = grad_weight = grad_bias = None
    if need_bias or (need_weight and x is not None):
        grad_weight, grad_bias = weight_gradients(grad_y, x if need_weight else None, mean, inverse, need_bias)
    if need_x:
        grad_x = torch.empty_like(grad_y, memory_format=torch.contiguous_format)
    if grad_x is not None and grad_x.numel() > 0:
        # A constant statistic leaves nothing in the backward that depends on x.
        x = None if frozen else x
        plan = backward_plans((grad_y, x, weight), weight_offset, mean is not None)
        grad, x = as_rows(grad_y, x)[1] if plan.copies else (grad_y, x)
        with guard(grad_y):
            plan.launch(grad, x, contiguous(weight), None if x is None else mean, inverse, grad_x)
    return grad_x, grad_weight, grad_bias
