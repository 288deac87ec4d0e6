"""The product of a gated MLP on a GPU: activation and product in one pass over memory, forward and backward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gim_kernels.told import tell
from gim_kernels.triton.device import check, guard
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.pointwise_tiles import Tile, gated_tile, pointwise_variant
from gim_kernels.triton.rows import Rows, Tensors, row_offset, rows_of
from gim_kernels.triton.tiles import Variant

#: The activations by the number the kernels know them by.
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _logit(x, ACTIVATION: tl.constexpr):
    """What ``act(x) / x`` is the sigmoid of: x for SiLU, twice the tanh's argument for the approximate GELU."""
    if ACTIVATION == 0:
        return x
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activation_ratio(x, ACTIVATION: tl.constexpr):
    """``act(x) / x``: sigmoid(x), the normal distribution function, or its tanh approximation, in float32.

    ``(1 + tanh(u)) / 2 = sigmoid(2 u)``, so that all that is small keeps its digits.
    """
    if ACTIVATION == 1:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return tl.sigmoid(_logit(x, ACTIVATION))


@triton.jit
def activation_derivative(x, ratio, ACTIVATION: tl.constexpr):
    """``act'(x)`` given ``ratio = act(x) / x``, in float32: ``ratio + x ratio'``."""
    if ACTIVATION == 1:
        return ratio + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    # 1 - sigmoid(u) = sigmoid(-u): the difference would have no digits where x, its factor, is large.
    slope = ratio * tl.sigmoid(-_logit(x, ACTIVATION))
    if ACTIVATION == 2:
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return ratio + x * slope


@triton.jit
def _tile(columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows (int32) and columns (int64) of this program's tile; neighbours in the grid share rows."""
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row_block = (tl.program_id(0) // column_blocks).to(tl.int32)
    column_block = tl.program_id(0) - row_block * column_blocks
    row = (row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row, column


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def gated_forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    rows: tl.int32,
    columns: tl.int64,
    size1,
    size2,
    gate_stride0,
    gate_stride1,
    gate_stride2,
    up_stride0,
    up_stride1,
    up_stride2,
    y_stride0,
    y_stride1,
    y_stride2,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``y = act(gate) * up``, the activation rounded to gate's dtype before the product."""
    # [BLOCK_ROWS, 1], [1, BLOCK_COLUMNS]
    row, column = _tile(columns, BLOCK_ROWS, BLOCK_COLUMNS)
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    mask = (row < rows) & (column < columns)
    gate_offset = row_offset(row, size1, size2, gate_stride0, gate_stride1, gate_stride2)
    gate = tl.load(gate_ptr + gate_offset + column, mask=mask, other=0.0)
    up_offset = row_offset(row, size1, size2, up_stride0, up_stride1, up_stride2)
    up = tl.load(up_ptr + up_offset + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide * activation_ratio(wide, ACTIVATION)).to(gate.dtype)
    y = activated.to(tl.float32) * up.to(tl.float32)
    y_offset = row_offset(row, size1, size2, y_stride0, y_stride1, y_stride2)
    tl.store(y_ptr + y_offset + column, y.to(gate.dtype), mask=mask)


@triton.jit(do_not_specialize=["rows", "size1", "size2"])
def gated_backward_kernel(
    grad_y_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    rows: tl.int32,
    columns: tl.int64,
    size1,
    size2,
    grad_y_stride0,
    grad_y_stride1,
    grad_y_stride2,
    gate_stride0,
    gate_stride1,
    gate_stride2,
    up_stride0,
    up_stride1,
    up_stride2,
    grad_gate_stride0,
    grad_gate_stride1,
    grad_gate_stride2,
    grad_up_stride0,
    grad_up_stride1,
    grad_up_stride2,
    gate_scale: tl.float32,
    up_scale: tl.float32,
    ACTIVATION: tl.constexpr,
    RATIO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``grad_gate = gate_scale * grad_y * up * act'(gate)``, ``grad_up = up_scale * grad_y * act(gate)``.

    With ``RATIO``, ``act(gate) / gate`` takes the place of ``act'(gate)``. A gradient without a pointer is left out;
    ``up_ptr`` is None without gate's.
    """
    # [BLOCK_ROWS, 1], [1, BLOCK_COLUMNS]
    row, column = _tile(columns, BLOCK_ROWS, BLOCK_COLUMNS)
    # [BLOCK_ROWS, BLOCK_COLUMNS]
    mask = (row < rows) & (column < columns)
    grad_y_offset = row_offset(row, size1, size2, grad_y_stride0, grad_y_stride1, grad_y_stride2)
    grad_y = tl.load(grad_y_ptr + grad_y_offset + column, mask=mask, other=0.0).to(tl.float32)
    gate_offset = row_offset(row, size1, size2, gate_stride0, gate_stride1, gate_stride2)
    gate = tl.load(gate_ptr + gate_offset + column, mask=mask, other=0.0).to(tl.float32)
    ratio = activation_ratio(gate, ACTIVATION)
    if grad_gate_ptr is not None:
        up_offset = row_offset(row, size1, size2, up_stride0, up_stride1, up_stride2)
        up = tl.load(up_ptr + up_offset + column, mask=mask, other=0.0).to(tl.float32)
        slope = ratio
        if not RATIO:
            slope = activation_derivative(gate, ratio, ACTIVATION)
        grad_gate = grad_y * up * slope * gate_scale
        offset = row_offset(row, size1, size2, grad_gate_stride0, grad_gate_stride1, grad_gate_stride2)
        tl.store(grad_gate_ptr + offset + column, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    if grad_up_ptr is not None:
        grad_up = grad_y * (gate * ratio) * up_scale
        offset = row_offset(row, size1, size2, grad_up_stride0, grad_up_stride1, grad_up_stride2)
        tl.store(grad_up_ptr + offset + column, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)


@functools.cache
def forward_variant(tile: Tile, dtype: torch.dtype, activation: str, merged: bool) -> Variant:
    """The kernel of the forward.

    Args:
        tile: from :func:`gim_kernels.triton.pointwise_tiles.gated_tile`.
        dtype: of all tensors.
        activation: one of :data:`ACTIVATIONS`.
        merged: whether the tensors' rows need one stride only.
    """
    pointers = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), dtype)
    constants = {"ACTIVATION": ACTIVATIONS[activation]}
    return pointwise_variant(f"gated_forward_{activation}", gated_forward_kernel, tile, pointers, merged, constants)


@functools.cache
def backward_variant(
    tile: Tile,
    dtype: torch.dtype,
    activation: str,
    activation_backward: str,
    needs: tuple[bool, bool],
    merged: bool,
) -> Variant:
    """The kernel of the backward; the arguments as of :func:`forward_variant` and :func:`gated_backward`."""
    pointers = {
        "grad_y_ptr": dtype,
        "gate_ptr": dtype,
        "up_ptr": dtype if needs[0] else None,
        "grad_gate_ptr": dtype if needs[0] else None,
        "grad_up_ptr": dtype if needs[1] else None,
    }
    constants = {"ACTIVATION": ACTIVATIONS[activation], "RATIO": activation_backward == "ratio"}
    name = "_".join(
        ["gated_backward", activation, activation_backward]
        + [which for which, need in zip(("gate", "up"), needs, strict=True) if need]
    )
    return pointwise_variant(name, gated_backward_kernel, tile, pointers, merged, constants)


def _in_memory_order(like: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``x`` with its dimensions sorted by the strides of ``like``: what is pointwise may run in any order."""
    like, x = torch.atleast_1d(like), torch.atleast_1d(x)
    sizes, strides = like.shape, like.stride()
    # Dimensions of one element have no stride worth the name: they must not come last.
    return x.permute(sorted(range(len(sizes)), key=lambda d: (sizes[d] > 1, -strides[d])))


def _one_row(rows: Rows) -> Rows:
    """The same elements as a single row where every tensor is contiguous, so that no block of columns is cut short."""
    if not rows.merged or any(strides and strides[-1] != rows.columns for strides in rows.strides):
        return rows
    elements = rows.count * rows.columns
    row = tuple(None if strides is None else (0, 0, elements) for strides in rows.strides)
    return Rows(1, elements, 1, 1, row)


def _prepare(like: torch.Tensor, read: Tensors, written: Tensors) -> tuple[Rows, Tensors, Tensors]:
    """Rows of all tensors, and what to launch with: views of them, or contiguous tensors where there are no rows."""
    read = tuple(None if x is None else _in_memory_order(like, x) for x in read)
    written = tuple(None if x is None else _in_memory_order(like, x) for x in written)
    # First tensors that have no rows on their own, then tensors whose leading dimensions do not merge alike.
    for everything in (False, True):
        rows = rows_of(*read, *written)
        if rows is not None:
            return _one_row(rows), read, written
        keep = [not everything and x is not None and rows_of(x) is not None for x in (*read, *written)]
        read = tuple(
            x if x is None or kept else x.contiguous() for x, kept in zip(read, keep[: len(read)], strict=True)
        )
        written = tuple(
            x if x is None or kept else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x, kept in zip(written, keep[len(read) :], strict=True)
        )
    rows = rows_of(*read, *written)
    assert rows is not None  # contiguous tensors have one leading dimension
    return _one_row(rows), read, written


def _give_back(like: torch.Tensor, written: torch.Tensor | None, out: torch.Tensor | None) -> None:
    """Copy what was written into ``out`` where :func:`_prepare` had to replace it."""
    if written is not None and out is not None and written.data_ptr() != out.data_ptr():
        _in_memory_order(like, out).copy_(written)


class _Rows(NamedTuple):
    """A launch over rows, and whether some tensor must be replaced for it, which :func:`_prepare` does."""

    launch: Launch
    replaces: bool


def _replaces(given: Tensors, prepared: Tensors) -> bool:
    pairs = zip(given, prepared, strict=True)
    return any(x is not None and y is not None and x.data_ptr() != y.data_ptr() for x, y in pairs)


def _programs(rows: Rows, tile: Tile) -> int:
    return triton.cdiv(rows.count, tile.rows) * triton.cdiv(rows.columns, tile.columns)


@Plans
def forward_plans(tensors: tuple[torch.Tensor, ...], activation: str) -> _Rows:
    """The forward for gate and up."""
    gate, up = tensors
    given = (gate, up, torch.empty_like(gate))
    rows, read, written = _prepare(gate, given[:2], given[2:])
    tile = gated_tile(rows.columns)
    variant = forward_variant(tile, gate.dtype, activation, rows.merged)
    launch = Launch(variant, _programs(rows, tile), **rows.arguments("gate", "up", "y"))
    return _Rows(launch, _replaces(given, (*read, *written)))


def gated_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :class:`gim_kernels.types.PointwiseEngine`; the result is as ``torch.empty_like(gate)``.

    Any strides: read without a copy where both tensors' elements lie next to each other along one dimension and at most
    three strides describe the others.

    Raises:
        TypeError, RuntimeError: tensors the kernels cannot take; see :func:`gim_kernels.triton.device.check`.

    Numerics: the activation in float32, rounded to gate's dtype; the product rounded again, as in eager PyTorch.
    """
    tell("triton")
    check(gate=gate, up=up)
    y = torch.empty_like(gate)
    if y.numel() == 0:
        return y
    plan = forward_plans((gate, up), activation)
    read: Tensors = (gate, up)
    written: Tensors = (y,)
    if plan.replaces:
        _, read, written = _prepare(gate, read, written)
    with guard(gate):
        plan.launch(*read, *written)
    if plan.replaces:
        _give_back(gate, written[0], y)
    return y


@Plans
def backward_plans(
    tensors: tuple[torch.Tensor, ...],
    activation: str,
    grad_scale: tuple[float, float],
    activation_backward: str,
    needs: tuple[bool, bool],
) -> _Rows:
    """The backward for grad_y, gate and up."""
    grad_y, gate, up = tensors
    places = tuple(torch.empty_like(x) if need else None for x, need in zip((gate, up), needs, strict=True))
    read_given = (gate, up if needs[0] else None, grad_y)
    rows, read, written = _prepare(gate, read_given, places)
    tile = gated_tile(rows.columns)
    launch = Launch(
        backward_variant(tile, gate.dtype, activation, activation_backward, needs, rows.merged),
        _programs(rows, tile),
        **rows.arguments("gate", "up", "grad_y", "grad_gate", "grad_up"),
        gate_scale=grad_scale[0],
        up_scale=grad_scale[1],
    )
    return _Rows(launch, _replaces((*read_given, *places), (*read, *written)))


def gated_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    grad_scale: tuple[float, float],
    activation_backward: str,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """See :class:`gim_kernels.types.PointwiseEngine`; gradients as ``torch.empty_like`` of their inputs.

    Raises:
        TypeError, RuntimeError: tensors the kernels cannot take; see :func:`gim_kernels.triton.device.check`.

    Numerics: float32, each gradient rounded once; deterministic.
    """
    check(grad_y=grad_y, gate=gate, up=up)
    grad_gate = torch.empty_like(gate) if needs[0] else None
    grad_up = torch.empty_like(up) if needs[1] else None
    if not any(needs) or gate.numel() == 0:
        return grad_gate, grad_up
    plan = backward_plans((grad_y, gate, up), activation, grad_scale, activation_backward, needs)
    read: Tensors = (gate, up if needs[0] else None, grad_y)
    written: Tensors = (grad_gate, grad_up)
    if plan.replaces:
        _, read, written = _prepare(gate, read, written)
    with guard(gate):
        plan.launch(read[2], read[0], read[1], *written)
    if plan.replaces:
        _give_back(gate, written[0], grad_gate)
        _give_back(gate, written[1], grad_up)
    return grad_gate, grad_up
