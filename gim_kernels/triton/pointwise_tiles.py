"""Tiles of the norms and the gated product: pure functions of the shape. Compiled for sm_80 and sm_90; not measured.

A thread holds 16 elements where it can: two 16-byte loads in half precision, so that a full multiprocessor of an
H100 has 64 KiB in flight, about twice what its bandwidth times its latency asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from gim_kernels.triton.tiles import Variant

#: Elements a thread should hold, and the fewest a program should.
ELEMENTS_PER_THREAD = 16
ELEMENTS_PER_PROGRAM = 2048
#: Columns of the narrowest tile, of the widest that holds a whole row, and of the loop over wider rows.
NARROWEST = 64
WIDEST = 16384
LOOP = 8192
MOST_WARPS = 16


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile, whether the columns are a whole row, and the warps that share it."""

    rows: int
    columns: int
    one_pass: bool
    num_warps: int


def _warps(elements: int) -> int:
    return min(MOST_WARPS, max(4, elements // (32 * ELEMENTS_PER_THREAD)))


def norm_tile(columns: int) -> Tile:
    """The tile of a norm's forward and backward for rows of ``columns`` elements."""
    block = max(NARROWEST, triton.next_power_of_2(columns))
    if block > WIDEST:
        return Tile(1, LOOP, False, _warps(LOOP))
    rows = max(1, ELEMENTS_PER_PROGRAM // block)
    return Tile(rows, block, True, _warps(rows * block))


#: A program of the weight's gradient sums tiles of this size down its rows; a program of the fold likewise.
WEIGHT_GRADIENT = Tile(32, 128, False, 4)
FOLD = Tile(32, 128, False, 4)
#: The fold of a few long rows: one after another.
FOLD_FEW = Tile(1, ELEMENTS_PER_PROGRAM, False, 4)
#: Programs the weight's gradient aims at: 8 for each multiprocessor of an H100, whatever the device at hand, so that
#: the order of the sums depends on the shape alone.
WEIGHT_GRADIENT_PROGRAMS = 1024


def rows_per_chunk(rows: int, columns: int) -> int:
    """How many rows one program of the weight's gradient sums, a multiple of its tile's rows."""
    blocks = triton.cdiv(rows, WEIGHT_GRADIENT.rows)
    chunks = max(1, WEIGHT_GRADIENT_PROGRAMS // triton.cdiv(columns, WEIGHT_GRADIENT.columns))
    return triton.cdiv(blocks, min(blocks, chunks)) * WEIGHT_GRADIENT.rows


def gated_tile(columns: int) -> Tile:
    """The tile of the gated product: programs cover a row in blocks of columns."""
    block = min(ELEMENTS_PER_PROGRAM, max(NARROWEST, triton.next_power_of_2(columns)))
    return Tile(ELEMENTS_PER_PROGRAM // block, block, False, _warps(ELEMENTS_PER_PROGRAM))


#: Triton's names of the dtypes the kernels know.
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


#: ... and of the annotations of their arguments.
ANNOTATIONS = {"tl.int32": "i32", "tl.int64": "i64", "tl.float32": "fp32", "tl.constexpr": "constexpr"}


def pointwise_variant(
    name: str,
    kernel: Any,
    tile: Tile,
    pointers: Mapping[str, torch.dtype | None],
    merged: bool,
    constants: Mapping[str, Any],
) -> Variant:
    """A kernel that walks rows, with every compile-time choice made.

    Args:
        name: the variant's, but for its tile and its strides, which are added.
        kernel: whose pointers are called ``*_ptr``; its other arguments are annotated, but for those that can be None:
            ``size1``, ``size2`` and each tensor's ``*_stride0``, ``*_stride1`` and ``*_stride2``.
        tile: becomes ``BLOCK_ROWS`` and ``BLOCK_COLUMNS``.
        pointers: dtype of every pointer, None for one that is absent.
        merged: whether one leading dimension is left; see :class:`gim_kernels.triton.rows.Rows`.
        constants: the other constexpr arguments.
    """
    signature: dict[str, str] = {}
    fixed: dict[str, Any] = {**constants, "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    annotations = kernel.fn.__annotations__
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            dtype = pointers[argument]
            kind = "constexpr" if dtype is None else f"*{TYPES[dtype]}"
        elif argument in annotations:
            kind = ANNOTATIONS[annotations[argument]]
        elif argument.startswith("size"):
            kind = "constexpr" if merged else "i32"
        else:
            tensor, dimension = argument.rsplit("_stride", 1)
            present = pointers[f"{tensor}_ptr"] is not None and (dimension == "2" or not merged)
            kind = "i64" if present else "constexpr"
        signature[argument] = kind
        if kind == "constexpr":
            fixed.setdefault(argument, None)
    # What 16-byte accesses to the rows need; one number for each row needs nothing.
    divisible = tuple(
        argument
        for argument, kind in signature.items()
        if kind != "constexpr"
        and (argument.endswith("_ptr") or argument == "columns" or "_stride" in argument)
        and argument not in ("mean_ptr", "inverse_ptr")
    )
    first, *others = ((pointer.removesuffix("_ptr"), dtype) for pointer, dtype in pointers.items())
    parts = ["gim", name, TYPES[first[1]]] if first[1] else ["gim", name]
    # Parameters and inputs by name where they are present, with their dtype where it is another.
    parts += [
        pointer if dtype == first[1] else f"{pointer}_{TYPES[dtype]}"
        for pointer, dtype in others
        if dtype is not None and pointer in ("x", "weight", "bias", "partial_bias")
    ]
    parts += [f"{tile.rows}x{tile.columns}"]
    parts += ["loop"] if fixed.get("ONE_PASS") is False else []
    parts += [] if merged else ["strided"]
    return Variant("_".join(parts), kernel, signature, fixed, divisible, tile.num_warps, 1)
