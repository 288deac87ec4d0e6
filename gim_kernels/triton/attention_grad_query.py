"""The kernel over query tiles of attention's backward: what the gradient of the scores must know of each row, and the
gradients of query and sinks.
"""

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
    matrix_of,
    raw_scores,
    sees,
    store_rows,
    tile_start,
    tiles_in,
    visible_keys,
)


@triton.jit
def _largest_score(
    top,
    query,
    matrix,
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
    """Maximum of ``top`` and the scores over the key tiles of ``span``, full or with ``MASKED`` the others."""
    key_matrix, key_stride_s = matrix
    factor, inner = scoring
    position, first, end, window = seen
    for i in range(tiles_in(span, MASKED, BLOCK_S)):
        start_s = tile_start(i, span, MASKED, LEFT, BLOCK_S)
        # [BLOCK_S, BLOCK_D]
        key = load_rows(key_matrix, start_s, key_stride_s, first, end, BLOCK_S, HEAD_SIZE, BLOCK_D, MASKED)
        # [BLOCK_T, BLOCK_S]
        score = raw_scores(query, tl.trans(key), inner, PRECISE) * factor
        if MASKED:
            column = start_s + tl.arange(0, BLOCK_S)
            score = tl.where(sees(position[:, None], column[None, :], first, end, window, CAUSAL), score, float("-inf"))
        top = tl.maximum(top, tl.max(score, 1))
    return top


@triton.jit
def _sum_over_keys(
    sums,
    query,
    grad_out,
    shift,
    near,
    matrices,
    scoring,
    seen,
    span,
    TOTALS: tl.constexpr,
    GRAD_QUERY: tl.constexpr,
    MASKED: tl.constexpr,
    LEFT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The key tiles of ``span``, full or with ``MASKED`` the others, into ``A, B, r, Z`` of :func:`grad_query_kernel`.

    ``near``, a column, takes the place of d0. ``r`` and ``Z`` need ``TOTALS``, ``A`` needs ``GRAD_QUERY``, ``B`` both.
    """
    shifted_sum, weight_sum, grad_total, weight_total = sums
    key_matrix, key_stride_s, value_matrix, value_stride_s = matrices
    factor, inner = scoring
    position, first, end, window = seen
    for i in range(tiles_in(span, MASKED, BLOCK_S)):
        start_s = tile_start(i, span, MASKED, LEFT, BLOCK_S)
        # [BLOCK_S, BLOCK_D]
        key = load_rows(key_matrix, start_s, key_stride_s, first, end, BLOCK_S, HEAD_SIZE, BLOCK_D, MASKED)
        # [BLOCK_T, BLOCK_S]
        raw = raw_scores(query, tl.trans(key), inner, PRECISE)
        e = tl.exp2(raw * factor - shift[:, None])
        if MASKED:
            column = start_s + tl.arange(0, BLOCK_S)
            e = tl.where(sees(position[:, None], column[None, :], first, end, window, CAUSAL), e, 0.0)
        # [BLOCK_S, BLOCK_D]
        value = load_rows(value_matrix, start_s, value_stride_s, first, end, BLOCK_S, HEAD_SIZE, BLOCK_D, MASKED)
        # [BLOCK_T, BLOCK_S]
        grad_p = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        shifted = e * (grad_p - near)
        if TOTALS:
            # [BLOCK_T]
            grad_total += tl.sum(shifted, 1)
            weight_total += tl.sum(e, 1)
        if GRAD_QUERY:
            if inner is not None:
                slope = 1.0 - raw * raw  # derivative of the cap
                shifted *= slope
                e *= slope
            # [BLOCK_T, BLOCK_D]
            shifted_sum = tl.dot(shifted.to(key.dtype), key, shifted_sum, input_precision="ieee")
            if TOTALS:
                weight_sum = tl.dot(e.to(key.dtype), key, weight_sum, input_precision="ieee")
    return shifted_sum, weight_sum, grad_total, weight_total


@triton.jit(do_not_specialize=["queries", "keys", "window", "heads", "group", "section"])
def grad_query_kernel(
    grad_out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    sinks_ptr,
    key_range_ptr,
    out_ptr,
    lse_ptr,
    grad_query_ptr,
    grad_sink_ptr,
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
    out_stride_b: tl.int64,
    out_stride_h: tl.int64,
    out_stride_t: tl.int64,
    grad_query_stride_b: tl.int64,
    grad_query_stride_h: tl.int64,
    grad_query_stride_t: tl.int64,
    heads,
    group,
    section,
    queries,
    keys,
    window,
    factor,
    inner,
    inverse_temperature,
    grad_factor,
    RULE: tl.constexpr,
    TWO_PASSES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Gradient of the query, and what the key kernel must know of each row, in one pass over the keys.

    With ``e_ij = exp((S'_ij - LSE_i) / T)`` and ``dP = dO V^T`` the rule asks for ``delta_i = sum_j P_T,ij dP_ij``,
    which is known only at the end. Shifted by ``d0 = rowsum(dO * O)``, which is close to it::

        A = sum_j e (dP - d0) t K_j    B = sum_j e t K_j    r = sum_j e (dP - d0)    Z = sum_j e
        grad_q = grad_factor (A - (r / Z) B) / Z            delta = d0 + r / Z

    ``t`` is 1, or ``1 - (S' / c)^2`` with a softcap; ``grad_factor = scale * q_scale``. A sink is a column with
    ``dP = 0`` and no key; its gradient is ``-P_T,sink delta``. With T = 1 the shift is delta itself: no B, r or Z.
    With ``TWO_PASSES`` delta is found first and takes the place of d0 in a second pass: one product more, but no B, and
    half the registers. With T < 1 ``e`` could underflow, so the row's maximum takes the place of LSE, found in a pass
    of its own; delta is then nearer to one ``dP`` than to d0, so nothing is subtracted in the first of two passes.

    Writes for the key kernel, where ``shift_ptr`` is given, ``[B, HQ, T]`` in base 2::

        rule      shift     norm                        delta
        exact     LSE       -                           delta
        square    LSE / 2   1 / Z                       delta / Z
        others    LSE       LSE of S' / T               delta

    Rows that see nothing give 0 everywhere. Without ``grad_query_ptr`` A and B are not computed; with ``exact``,
    nothing is: d0 is all there is to know. Program order as in the forward.
    """
    tiles_t = tl.cdiv(queries, BLOCK_T)
    tile, batch_head = tile_of_program(tl.program_id(0), tiles_t, tl.num_programs(0) // tiles_t, section)
    if CAUSAL:
        tile = tiles_t - 1 - tile
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    key_head = head // group
    start_t = tile * BLOCK_T

    grad_out_matrix = matrix_of(grad_out_ptr, batch, head, grad_out_stride_b, grad_out_stride_h)
    query_matrix = matrix_of(query_ptr, batch, head, query_stride_b, query_stride_h)
    key_matrix = matrix_of(key_ptr, batch, key_head, key_stride_b, key_stride_h)
    value_matrix = matrix_of(value_ptr, batch, key_head, value_stride_b, value_stride_h)
    out_ptr += batch * out_stride_b + head * out_stride_h

    # [BLOCK_T]
    row = start_t + tl.arange(0, BLOCK_T)
    first_row = batch_head.to(tl.int64) * queries
    in_rows = row < queries
    lse2 = tl.load(lse_ptr + first_row + row, mask=in_rows, other=float("inf")) * LOG2E
    # [BLOCK_T, BLOCK_D]
    grad_out = load_rows(grad_out_matrix, start_t, grad_out_stride_t, None, queries, BLOCK_T, HEAD_SIZE, BLOCK_D, True)
    out = load_rows(out_ptr, start_t, out_stride_t, None, queries, BLOCK_T, HEAD_SIZE, BLOCK_D, True)
    # [BLOCK_T, 1]: a reshaped column, or else every thread keeps d0 once for each of its scores through the loops below
    d0 = tl.reshape(tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1), [BLOCK_T, 1])
    if RULE == "sharp":
        d0 = tl.zeros([BLOCK_T, 1], tl.float32)

    # [BLOCK_T]
    grad_total = tl.zeros([BLOCK_T], tl.float32)
    weight_total = tl.zeros([BLOCK_T], tl.float32)
    shift = lse2 * inverse_temperature
    if RULE != "exact" or grad_query_ptr is not None:
        # [BLOCK_T, BLOCK_D]
        query = load_rows(query_matrix, start_t, query_stride_t, None, queries, BLOCK_T, HEAD_SIZE, BLOCK_D, True)
        matrices = (key_matrix, key_stride_s, value_matrix, value_stride_s)
        scoring = (factor * inverse_temperature, inner)
        first, end = key_bounds(key_range_ptr, batch, keys)
        seen = (row + (keys - queries), None if key_range_ptr is None else first, end, window)
        span = visible_keys(start_t, queries, keys, first, end, window, CAUSAL, BLOCK_T, BLOCK_S)
        if RULE == "sharp":
            top = tl.full([BLOCK_T], float("-inf"), tl.float32)
            if sinks_ptr is not None:
                top = tl.zeros([BLOCK_T], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * (
                    LOG2E * inverse_temperature
                )
            for MASKED in tl.static_range(0, 2):
                top = _largest_score(
                    top,
                    query,
                    (key_matrix, key_stride_s),
                    scoring,
                    seen,
                    span,
                    MASKED,
                    window is not None or key_range_ptr is not None,
                    CAUSAL,
                    HEAD_SIZE,
                    BLOCK_D,
                    BLOCK_S,
                    PRECISE,
                )
            shift = tl.where(top == float("-inf"), float("inf"), top)
        if sinks_ptr is not None and RULE != "exact":
            sink2 = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            weight_total = tl.exp2(sink2 * inverse_temperature - shift)
            grad_total = -weight_total * tl.reshape(d0, [BLOCK_T])
        # [BLOCK_T, BLOCK_D]
        zeros = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        sums = (zeros, zeros, grad_total, weight_total)
        for MASKED in tl.static_range(0, 2):
            sums = _sum_over_keys(
                sums,
                query,
                grad_out,
                shift,
                d0,
                matrices,
                scoring,
                seen,
                span,
                RULE != "exact",
                grad_query_ptr is not None and not TWO_PASSES,
                MASKED,
                window is not None or key_range_ptr is not None,
                CAUSAL,
                HEAD_SIZE,
                BLOCK_D,
                BLOCK_S,
                PRECISE,
            )
        shifted_sum, weight_sum, grad_total, weight_total = sums

    # [BLOCK_T]
    near = d0  # [BLOCK_T, 1]
    if RULE != "exact":
        empty = weight_total == 0.0
        weight_total = tl.where(empty, 1.0, weight_total)
        inverse_total = tl.where(empty, 0.0, 1.0 / weight_total)
        mean = grad_total * inverse_total
        near = d0 + mean[:, None]
    delta = tl.reshape(near, [BLOCK_T])
    if grad_sink_ptr is not None:
        sink2 = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        sink_weight = tl.exp2(sink2 * inverse_temperature - shift)
        if RULE != "exact":
            sink_weight *= inverse_total
        tl.store(grad_sink_ptr + first_row + row, -sink_weight * delta, mask=in_rows)
    if shift_ptr is not None:
        if RULE == "square":
            tl.store(shift_ptr + first_row + row, shift, mask=in_rows)
            tl.store(norm_ptr + first_row + row, inverse_total, mask=in_rows)
            tl.store(delta_ptr + first_row + row, delta * inverse_total, mask=in_rows)
        else:
            tl.store(shift_ptr + first_row + row, lse2, mask=in_rows)
            tl.store(delta_ptr + first_row + row, delta, mask=in_rows)
            if RULE != "exact":
                norm = tl.where(empty, float("inf"), shift + tl.log2(weight_total))
                tl.store(norm_ptr + first_row + row, norm, mask=in_rows)

    if grad_query_ptr is not None:
        # [BLOCK_T, BLOCK_D]
        if TWO_PASSES:
            sums = (zeros, zeros, grad_total, weight_total)
            for MASKED in tl.static_range(0, 2):
                sums = _sum_over_keys(
                    sums,
                    query,
                    grad_out,
                    shift,
                    near,
                    matrices,
                    scoring,
                    seen,
                    span,
                    False,
                    True,
                    MASKED,
                    window is not None or key_range_ptr is not None,
                    CAUSAL,
                    HEAD_SIZE,
                    BLOCK_D,
                    BLOCK_S,
                    PRECISE,
                )
            shifted_sum, weight_sum, grad_total, weight_total = sums
        if RULE == "exact":
            grad_query = shifted_sum * grad_factor
        elif TWO_PASSES:
            grad_query = shifted_sum * (inverse_total * grad_factor)[:, None]
        else:
            grad_query = (shifted_sum - mean[:, None] * weight_sum) * (inverse_total * grad_factor)[:, None]
        grad_query_ptr += batch * grad_query_stride_b + head * grad_query_stride_h
        store_rows(grad_query_ptr, grad_query, start_t, grad_query_stride_t, queries, BLOCK_T, HEAD_SIZE, BLOCK_D)


@functools.cache
def grad_query_variant(
    architecture: str,
    dtype: torch.dtype,
    head_size: int,
    rule: tiles.Rule,
    causal: bool,
    window: bool = False,
    softcap: bool = False,
    sinks: torch.dtype | None = None,
    key_range: bool = False,
    grad_query: bool = True,
    grad_sinks: bool = False,
    hand_over: bool = True,
    described: bool = False,
    tile: tiles.Tile | None = None,
) -> tiles.Variant:
    """The kernel over query tiles for these options; see :class:`gim_kernels.triton.tiles.Variant`.

    Args:
        architecture: as :func:`gim_kernels.triton.tiles.architecture_of` gives it, e.g. ``"cuda:90"``.
        dtype: of query, key, value, output and gradients.
        head_size: D, 1 to 256.
        rule: ``"exact"``, ``"square"``, ``"warm"`` or ``"sharp"``.
        causal, window, softcap, key_range: whether the kernel has them.
        sinks: dtype of the sinks, None without.
        grad_query, grad_sinks: whether it writes these gradients.
        hand_over: whether it writes what the key kernel needs.
        described: whether it reads matrices through tensor descriptors.
        tile: in place of the table's.
    """
    work: tiles.Work = "grad_query_exact" if rule == "exact" else "grad_query"
    tile = tile or tiles.attention_tile(work, architecture, head_size, dtype, softcap, described)
    two_passes = rule == "sharp" or (tile.split and rule != "exact")
    return tiles.attention_variant(
        grad_query_kernel,
        tile,
        dtype,
        head_size,
        {"CAUSAL": causal, "RULE": rule, "TWO_PASSES": two_passes and grad_query},
        {
            "window": window,
            "inner": softcap,
            "key_range_ptr": key_range,
            "sinks_ptr": sinks is not None,
            "grad_query_ptr": grad_query,
            "grad_sink_ptr": grad_sinks,
            "shift_ptr": hand_over,
            "norm_ptr": hand_over and rule != "exact",
            "delta_ptr": hand_over,
        },
        sinks,
        described,
    )
