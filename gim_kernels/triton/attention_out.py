"""Attention forward on a GPU: one pass with an online softmax, which keeps the output and one number per row.

Tiles are read through tensor descriptors (TMA) where :func:`gim_kernels.triton.launch.described` allows it, and through
plain pointers elsewhere: strided views of any alignment work.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gim_kernels.told import tell
from gim_kernels.triton import tiles
from gim_kernels.triton.device import guard
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.launch import (
    SMALLEST_FACTOR,
    as_walked,
    check_attention,
    described,
    hiding_window,
    matrices,
    query_section,
    readable,
    score_factors,
    strides,
    unit_stride,
)
from gim_kernels.triton.order import tile_of_program
from gim_kernels.triton.primitives import (
    LN2,
    LOG2E,
    key_bounds,
    load_rows,
    matrix_of,
    raw_scores,
    sees,
    store_rows,
    tile_start,
    tiles_in,
    visible_keys,
)
from gim_kernels.triton.rows import contiguous
from gim_kernels.types import Options


@triton.jit
def _online_softmax(
    state,
    query,
    matrices,
    scoring,
    seen,
    span,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The key tiles of ``span``, full or with ``MASKED`` the others, into the running output, sum and maximum."""
    out, total, top2 = state
    key_matrix, key_stride_s, value_matrix, value_stride_s = matrices
    factor, inner = scoring
    position, first, end, window = seen
    for i in range(tiles_in(span, MASKED, BLOCK_S)):
        start_s = tile_start(i, span, MASKED, LEFT, BLOCK_S)
        # [BLOCK_S, BLOCK_D]
        key = load_rows(key_matrix, start_s, key_stride_s, first, end, BLOCK_S, HEAD_SIZE, BLOCK_D, MASKED)
        # [BLOCK_T, BLOCK_S]
        raw = raw_scores(query, tl.trans(key), inner, PRECISE)
        if MASKED:
            column = start_s + tl.arange(0, BLOCK_S)
            raw = tl.where(sees(position[:, None], column[None, :], first, end, window, CAUSAL), raw, float("-inf"))
        # [BLOCK_T]
        new_top2 = tl.maximum(top2, tl.max(raw, 1) * factor)
        shift2 = new_top2
        if MASKED:  # rows that have seen nothing yet
            shift2 = tl.where(new_top2 == float("-inf"), 0.0, new_top2)
        # [BLOCK_T, BLOCK_S]
        weight = tl.exp2(raw * factor - shift2[:, None])
        # [BLOCK_T]
        correction = tl.exp2(top2 - shift2)
        total = total * correction + tl.sum(weight, 1)
        # [BLOCK_T, BLOCK_D]
        out = out * correction[:, None]
        # [BLOCK_S, BLOCK_D]
        value = load_rows(value_matrix, start_s, value_stride_s, first, end, BLOCK_S, HEAD_SIZE, BLOCK_D, MASKED)
        out = tl.dot(weight.to(value.dtype), value, out, input_precision="ieee")
        top2 = new_top2
    return out, total, top2


@triton.jit(do_not_specialize=["queries", "keys", "window", "heads", "group", "section"])
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    sinks_ptr,
    key_range_ptr,
    out_ptr,
    lse_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_t: tl.int64,
    heads,
    group,
    section,
    queries,
    keys,
    window,
    factor,
    inner,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """``S' = log(2) * factor * raw(Q K^T)``, ``P = softmax(S')``, ``O = P V``, ``LSE_i = log sum_j exp S'_ij``.

    The usual online softmax in base 2, ``m`` the running maximum (``top2``) and ``l`` the running sum (``total``)::

        m' = max(m, rowmax S2)    l' = l 2^(m - m') + rowsum 2^(S2 - m')    O' = O 2^(m - m') + 2^(S2 - m') V

    A sink is a column with a score and no value: ``m`` starts at it and ``l`` at 1. Rows that see nothing give
    ``O = 0`` and ``LSE = +inf``, so that every later ``exp(S' - LSE)`` is 0. ``factor`` must be positive.

    One program per query tile and head, in the order of :func:`gim_kernels.triton.order.tile_of_program`; causal tiles
    from the last to the first, the longest first.
    """
    tiles_t = tl.cdiv(queries, BLOCK_T)
    tile, batch_head = tile_of_program(tl.program_id(0), tiles_t, tl.num_programs(0) // tiles_t, section)
    if CAUSAL:
        tile = tiles_t - 1 - tile
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    key_head = head // group
    start_t = tile * BLOCK_T

    query_matrix = matrix_of(query_ptr, batch, head, query_stride_b, query_stride_h)
    key_matrix = matrix_of(key_ptr, batch, key_head, key_stride_b, key_stride_h)
    value_matrix = matrix_of(value_ptr, batch, key_head, value_stride_b, value_stride_h)
    out_ptr += batch * out_stride_b + head * out_stride_h

    # [BLOCK_T, BLOCK_D]
    query = load_rows(query_matrix, start_t, query_stride_t, None, queries, BLOCK_T, HEAD_SIZE, BLOCK_D, True)
    out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    # [BLOCK_T]
    row = start_t + tl.arange(0, BLOCK_T)
    top2 = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    if sinks_ptr is not None:
        sink2 = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top2 = tl.zeros([BLOCK_T], tl.float32) + sink2
        total += tl.where(sink2 == float("-inf"), 0.0, 1.0)

    first, end = key_bounds(key_range_ptr, batch, keys)
    span = visible_keys(start_t, queries, keys, first, end, window, CAUSAL, BLOCK_T, BLOCK_S)
    state = (out, total, top2)
    for MASKED in tl.static_range(0, 2):
        state = _online_softmax(
            state,
            query,
            (key_matrix, key_stride_s, value_matrix, value_stride_s),
            (factor, inner),
            (row + (keys - queries), None if key_range_ptr is None else first, end, window),
            span,
            MASKED,
            window is not None or key_range_ptr is not None,
            CAUSAL,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_S,
            PRECISE,
        )
    out, total, top2 = state

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = out / total[:, None]
    lse = tl.where(empty, float("inf"), (top2 + tl.log2(total)) * LN2)
    store_rows(out_ptr, out, start_t, out_stride_t, queries, BLOCK_T, HEAD_SIZE, BLOCK_D)
    tl.store(lse_ptr + batch_head.to(tl.int64) * queries + row, lse, mask=row < queries)


@functools.cache
def forward_variant(
    architecture: str,
    dtype: torch.dtype,
    head_size: int,
    causal: bool,
    window: bool = False,
    softcap: bool = False,
    sinks: torch.dtype | None = None,
    key_range: bool = False,
    described: bool = False,
    tile: tiles.Tile | None = None,
) -> tiles.Variant:
    """The forward kernel for these options; see :class:`gim_kernels.triton.tiles.Variant`.

    Args:
        architecture: as :func:`gim_kernels.triton.tiles.architecture_of` gives it, e.g. ``"cuda:90"``.
        dtype: of query, key, value and the output.
        head_size: D, 1 to 256.
        causal, window, softcap, key_range: whether the kernel has them.
        sinks: dtype of the sinks, None without.
        described: whether it reads matrices through tensor descriptors.
        tile: in place of the table's.
    """
    tile = tile or tiles.attention_tile("forward", architecture, head_size, dtype, softcap, described)
    return tiles.attention_variant(
        attention_forward_kernel,
        tile,
        dtype,
        head_size,
        {"CAUSAL": causal},
        {"window": window, "inner": softcap, "key_range_ptr": key_range, "sinks_ptr": sinks is not None},
        sinks,
        described,
    )


class _Plan(NamedTuple):
    """What the forward does for tensors of given layouts.

    Args:
        out_shape, out_strides: of the output, ``[B, HQ, T, D]``.
        lse_shape: of the log-sum-exp.
        copies: whether query, key or value must be copied first.
        launch: the kernel; None where there is nothing to compute.
    """

    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    copies: bool
    launch: Launch | None


@Plans
def forward_plans(tensors: tuple[torch.Tensor, ...], options: Options) -> _Plan:
    """The plan for query, key, value, sinks and key range."""
    query, key, value, sinks, key_range = tensors
    check_attention(query, key, value)
    architecture = tiles.architecture_of(query)
    copies = not all(map(readable, tensors[:3]))
    query, key, value = as_walked(query), as_walked(key), as_walked(value)
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    out = query.new_empty((batch, queries, heads, size), device="meta").transpose(1, 2)
    results = (tuple(out.shape), out.stride(), (batch, heads, queries), copies)
    if query.numel() == 0:
        return _Plan(*results, None)
    factor, inner = score_factors(options)
    window = hiding_window(options, keys)
    variant = forward_variant(
        architecture,
        query.dtype,
        size,
        options.causal,
        window is not None,
        inner is not None,
        None if sinks is None else sinks.dtype,
        key_range is not None,
        described(architecture, inner, key_range, query, key, value),
    )
    tiles_t = triton.cdiv(queries, variant.constants["BLOCK_T"])
    launch = Launch(
        variant,
        tiles_t * batch * heads,
        **matrices(variant, query=query, key=key, value=value),
        **strides("out", out, "t"),
        heads=heads,
        group=heads // key.shape[1],
        section=query_section(tiles_t, query, key, options.causal),
        queries=queries,
        keys=keys,
        window=window,
        factor=max(factor, SMALLEST_FACTOR),
        inner=inner,
    )
    return _Plan(*results, launch)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :class:`gim_kernels.types.AttentionEngine`; nothing is read back to the host.

    float32, float16 or bfloat16, D at most 256; where the last stride is not 1, a contiguous copy is made.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gim_kernels.triton.launch.check_attention`.

    Numerics: scores, sums and the output accumulate in float32; weights are rounded to query's dtype for the product
        with V; deterministic, bit for bit.
    """
    tell("triton")
    if options.softcap is None and options.scale < 0:  # the running maximum wants a positive factor
        query, options = -query, dataclasses.replace(options, scale=-options.scale)
    plan = forward_plans((query, key, value, sinks, key_range), options)
    out = query.new_empty_strided(plan.out_shape, plan.out_strides)
    lse = query.new_empty(plan.lse_shape, dtype=torch.float32)
    if plan.copies:
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    if plan.launch is not None:
        with guard(query):
            plan.launch(query, key, value, contiguous(sinks), contiguous(key_range), out, lse)
    return out, lse
