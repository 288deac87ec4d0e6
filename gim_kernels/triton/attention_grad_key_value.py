"""The kernel over key tiles of attention's backward: the gradients of key and value."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from gim_kernels.triton import tiles
from gim_kernels.triton.order import tile_of_program
from gim_kernels.triton.primitives import (
    LOG2E,
    key_bounds,
    load_rows,
    load_vector,
    matrix_after,
    matrix_of,
    raw_scores,
    sees,
    store_rows,
    tile_start,
    tiles_in,
    visible_queries,
)


@triton.jit
def _sum_over_queries(
    sums,
    key,
    value,
    matrices,
    rows,
    scoring,
    seen,
    span,
    members,
    RULE: tl.constexpr,
    GRAD_KEY: tl.constexpr,
    GRAD_VALUE: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The query tiles of ``span``, full or with ``MASKED`` the others, into the gradients of key and value.

    All query heads of the program run in one loop, so that the loads of the next head are under way when one ends.
    """
    grad_key, grad_value = sums
    first_query, query_stride_h, query_stride_t, first_grad_out, grad_out_stride_h, grad_out_stride_t = matrices
    first_shift_ptr, first_norm_ptr, first_delta_ptr = rows
    factor, inner, inverse_temperature = scoring
    column, offset, queries, window = seen
    tiles_of_head = tiles_in(span, MASKED, BLOCK_T)
    member = tiles_of_head * 0
    tile = tiles_of_head * 0
    for _ in range(members * tiles_of_head):
        start_t = tile_start(tile, span, MASKED, True, BLOCK_T)
        query_matrix = matrix_after(first_query, member, query_stride_h)
        grad_out_matrix = matrix_after(first_grad_out, member, grad_out_stride_h)
        head_row = member.to(tl.int64) * queries
        # [BLOCK_T]
        row = start_t + tl.arange(0, BLOCK_T)
        # [BLOCK_T, BLOCK_D]
        query = load_rows(query_matrix, start_t, query_stride_t, None, queries, BLOCK_T, HEAD_SIZE, BLOCK_D, MASKED)
        shift = load_vector(first_shift_ptr + head_row, row, queries, float("inf"), MASKED)
        if RULE == "constant":  # straight from the forward, to base e
            shift *= LOG2E
        # [BLOCK_S, BLOCK_T]
        raw = raw_scores(key, tl.trans(query), inner, PRECISE)
        p_t = tl.exp2(raw * (factor * 0.5 if RULE == "square" else factor) - shift[None, :])
        # Queries past the last have an infinite shift, and so a p of 0; keys past the last are not stored.
        if MASKED and (CAUSAL or window is not None):
            mask = sees((row + offset)[None, :], column[:, None], None, queries + offset, window, CAUSAL)
            p_t = tl.where(mask, p_t, 0.0)
        p = p_t
        if RULE == "square":
            p = p_t * p_t  # and p_t is P_T * Z
        # [BLOCK_T, BLOCK_D]
        grad_out = load_rows(
            grad_out_matrix, start_t, grad_out_stride_t, None, queries, BLOCK_T, HEAD_SIZE, BLOCK_D, MASKED
        )
        if GRAD_VALUE:
            # [BLOCK_S, BLOCK_D]
            grad_value = tl.dot(p.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        if GRAD_KEY:
            # [BLOCK_T]
            delta = load_vector(first_delta_ptr + head_row, row, queries, 0.0, MASKED)
            # [BLOCK_S, BLOCK_T]
            grad_p = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
            if RULE == "square":
                norm = load_vector(first_norm_ptr + head_row, row, queries, 0.0, MASKED)
                grad_p = grad_p * norm[None, :]
            elif RULE != "exact":
                norm = load_vector(first_norm_ptr + head_row, row, queries, float("inf"), MASKED)
                p_t = tl.exp2(raw * (factor * inverse_temperature) - norm[None, :])
                if MASKED and (CAUSAL or window is not None):
                    p_t = tl.where(mask, p_t, 0.0)
            grad_s = p_t * (grad_p - delta[None, :])
            if inner is not None:
                grad_s *= 1.0 - raw * raw
            # [BLOCK_S, BLOCK_D]
            grad_key = tl.dot(grad_s.to(query.dtype), query, grad_key, input_precision="ieee")
        tile += 1
        ended = (tile == tiles_of_head).to(tl.int32)  # counted, for a division would cost as much as the rest
        member += ended
        tile *= 1 - ended
    return grad_key, grad_value


@triton.jit
def _store_sum(
    whole_ptr,
    part_ptr,
    parted,
    tile,
    start,
    stride,
    end,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ``tile`` as :func:`store_rows` does: where it is ``parted`` to the sums to be folded, else to its place."""
    if parted:
        store_rows(part_ptr, tile, start, stride, end, ROWS, HEAD_SIZE, BLOCK_D)
    else:
        store_rows(whole_ptr, tile, start, stride, end, ROWS, HEAD_SIZE, BLOCK_D)


@triton.jit(do_not_specialize=["queries", "keys", "window", "heads", "group", "members", "section"])
def grad_key_value_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    key_range_ptr,
    grad_key_ptr,
    grad_value_ptr,
    partial_ptr,
    shift_ptr,
    norm_ptr,
    delta_ptr,
    grad_out_stride_b,
    grad_out_stride_h,
    grad_out_stride_t,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    grad_key_stride_b: tl.int64,
    grad_key_stride_h: tl.int64,
    grad_key_stride_s: tl.int64,
    grad_value_stride_b: tl.int64,
    grad_value_stride_h: tl.int64,
    grad_value_stride_s: tl.int64,
    grad_stride_part: tl.int64,
    heads,
    group,
    members,
    section,
    queries,
    keys,
    window,
    factor,
    inner,
    inverse_temperature,
    key_factor,
    value_factor,
    RULE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Gradients of key and value, summed over query heads that share them in a fixed order::

        grad_v = value_factor P^T dO                         P = exp(S' - LSE): the value path keeps T = 1
        grad_k = key_factor (P_T * (dP - delta) t)^T Q       dP = dO V^T,  key_factor = scale * k_scale

    ``t`` as in :func:`gim_kernels.triton.attention_grad_query.grad_query_kernel`, which wrote ``shift``, ``norm`` and
    ``delta``. With T = 2, ``P_T = e / Z`` and ``P = e e`` come from one exponential. With the rule ``constant``
    ``shift`` is the forward's natural LSE and only grad_v exists. A gradient without a pointer is not computed.
    Everything is transposed, ``[BLOCK_S, BLOCK_T]``, so that both sums over queries take their left side from
    registers.

    One program per key tile and ``members`` query heads: all that share a key head, or an equal part of them. Sums of
    parts go to ``partial_ptr``, in float32 and ``grad_stride_part`` elements apart, first those of keys, then those of
    values, each with the gradients' strides, and are folded afterwards. The order is that of
    :func:`gim_kernels.triton.order.tile_of_program`: with a causal mask the first keys, which most queries see, take
    longest.
    """
    tiles_s = tl.cdiv(keys, BLOCK_S)
    tile, batch_part = tile_of_program(tl.program_id(0), tiles_s, tl.num_programs(0) // tiles_s, section)
    start_s = tile * BLOCK_S
    batch = (batch_part * members // heads).to(tl.int64)
    head = (batch_part * members % heads).to(tl.int64)
    key_head = head // group
    part = head % group // members
    key_matrix = matrix_of(key_ptr, batch, key_head, key_stride_b, key_stride_h)

    # [BLOCK_S, BLOCK_D]
    key = load_rows(key_matrix, start_s, key_stride_s, None, keys, BLOCK_S, HEAD_SIZE, BLOCK_D, True)
    value = key
    if grad_key_ptr is not None:
        value_matrix = matrix_of(value_ptr, batch, key_head, value_stride_b, value_stride_h)
        value = load_rows(value_matrix, start_s, value_stride_s, None, keys, BLOCK_S, HEAD_SIZE, BLOCK_D, True)
    grad_key = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)

    first, end = key_bounds(key_range_ptr, batch, keys)
    span = visible_queries(start_s, queries, keys, first, end, window, CAUSAL, BLOCK_T, BLOCK_S)
    # [BLOCK_S]
    column = start_s + tl.arange(0, BLOCK_S)
    sums = (grad_key, grad_value)
    rows = (batch * heads + head) * queries
    for MASKED in tl.static_range(0, 2):
        sums = _sum_over_queries(
            sums,
            key,
            value,
            (
                matrix_of(query_ptr, batch, head, query_stride_b, query_stride_h),
                query_stride_h,
                query_stride_t,
                matrix_of(grad_out_ptr, batch, head, grad_out_stride_b, grad_out_stride_h),
                grad_out_stride_h,
                grad_out_stride_t,
            ),
            (
                shift_ptr + rows,
                None if norm_ptr is None else norm_ptr + rows,
                None if delta_ptr is None else delta_ptr + rows,
            ),
            (factor, inner, inverse_temperature),
            (column, keys - queries, queries, window),
            span,
            members,
            RULE,
            grad_key_ptr is not None,
            grad_value_ptr is not None,
            MASKED,
            CAUSAL,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_T,
            PRECISE,
        )
    grad_key, grad_value = sums

    # [BLOCK_S, 1]
    exists = ((column >= first) & (column < end))[:, None]
    parted = members < group
    if grad_key_ptr is not None:
        grad_key = tl.where(exists, grad_key * key_factor, 0.0)
        head_offset = batch * grad_key_stride_b + key_head * grad_key_stride_h
        _store_sum(
            grad_key_ptr + head_offset,
            partial_ptr + part * grad_stride_part + head_offset,
            parted,
            grad_key,
            start_s,
            grad_key_stride_s,
            keys,
            BLOCK_S,
            HEAD_SIZE,
            BLOCK_D,
        )
        part += group // members
    if grad_value_ptr is not None:
        grad_value = tl.where(exists, grad_value * value_factor, 0.0)
        head_offset = batch * grad_value_stride_b + key_head * grad_value_stride_h
        _store_sum(
            grad_value_ptr + head_offset,
            partial_ptr + part * grad_stride_part + head_offset,
            parted,
            grad_value,
            start_s,
            grad_value_stride_s,
            keys,
            BLOCK_S,
            HEAD_SIZE,
            BLOCK_D,
        )


@functools.cache
def grad_key_value_variant(
    architecture: str,
    dtype: torch.dtype,
    head_size: int,
    rule: tiles.Rule,
    causal: bool,
    window: bool = False,
    softcap: bool = False,
    key_range: bool = False,
    grad_key: bool = True,
    grad_value: bool = True,
    described: bool = False,
    tile: tiles.Tile | None = None,
) -> tiles.Variant:
    """The kernel over key tiles for these options.

    Arguments as in :func:`gim_kernels.triton.attention_grad_query.grad_query_variant`. ``"warm"`` and ``"sharp"`` are
    the same here. Without ``grad_key`` the rule must be ``"constant"``, and with it not.
    """
    if (rule == "constant") == grad_key:
        raise ValueError(f"rule {rule!r} does not fit grad_key={grad_key}")
    rule = "warm" if rule == "sharp" else rule
    work: tiles.Work = "grad_key_value" if grad_key and grad_value else "grad_key" if grad_key else "grad_value"
    tile = tile or tiles.attention_tile(work, architecture, head_size, dtype, softcap, described)
    return tiles.attention_variant(
        grad_key_value_kernel,
        tile,
        dtype,
        head_size,
        {"CAUSAL": causal, "RULE": rule},
        {
            "window": window,
            "inner": softcap,
            "key_range_ptr": key_range,
            "grad_key_ptr": grad_key,
            "grad_value_ptr": grad_value,
            "norm_ptr": grad_key and rule != "exact",
            "delta_ptr": grad_key,
        },
        described=described,
    )
