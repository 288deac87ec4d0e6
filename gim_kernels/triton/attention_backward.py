"""Attention backward on a GPU under one of three softmax rules: one kernel over query tiles, one over key tiles.

The query kernel finds what the gradient of the scores needs to know about each row, and the gradients of query and
sinks. The key kernel finds the gradients of key and value; where too few of its programs would run, several share the
query heads of a key head, and their sums are folded. Either does only what was asked for; there is no preprocessing
pass, and there are no atomics: every sum has one order.

Tiles are read through tensor descriptors (TMA) where :func:`gim_kernels.triton.launch.described` allows it, and through
plain pointers elsewhere: strided views of any alignment work.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl

from gim_kernels.triton import tiles
from gim_kernels.triton.attention_fold import fold_parts
from gim_kernels.triton.device import guard
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.launch import (
    as_walked,
    check_attention,
    described,
    hiding_window,
    key_section,
    matrices,
    query_section,
    readable,
    score_factors,
    strides,
    unit_stride,
)
from gim_kernels.triton.order import members_of, tile_of_program
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
    visible_keys,
    visible_queries,
)
from gim_kernels.triton.rows import contiguous
from gim_kernels.types import Options

#: How a kernel finds the softmax at temperature T. ``exact``: T = 1, delta from the output. ``square``: T = 2, whose
#: square is the softmax at T = 1. ``warm``: any T >= 1. ``sharp``: T < 1, where exp((S' - LSE) / T) would underflow.
Rule = Literal["constant", "exact", "square", "warm", "sharp"]


def rule_of(
    softmax_backward: str, temperature: float, dtype: torch.dtype, grad_sinks: bool = False
) -> tuple[Rule, float]:
    """The kernels' rule and temperature for the public arguments; ``grad_sinks``: whether that gradient is wanted."""
    if softmax_backward == "constant":
        return "constant", 1.0
    if softmax_backward == "exact" or temperature == 1.0:
        # rowsum(dO * O) is delta up to the rounding of O. In two bytes that is below the rounding of everything else;
        # float32 takes the sum over the keys, as for any other temperature; so does the gradient of the sinks, a sum of
        # nothing but deltas, whose rounding would be all that is left where they cancel.
        return ("warm" if dtype == torch.float32 or grad_sinks else "exact"), 1.0
    if temperature == 2.0:
        return "square", 2.0
    return ("warm" if temperature > 1.0 else "sharp"), temperature


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

    ``t`` as in :func:`grad_query_kernel`, which wrote ``shift``, ``norm`` and ``delta``. With T = 2, ``P_T = e / Z``
    and ``P = e e`` come from one exponential. With the rule ``constant`` ``shift`` is the forward's natural LSE and
    only grad_v exists. A gradient without a pointer is not computed. Everything is transposed, ``[BLOCK_S, BLOCK_T]``,
    so that both sums over queries take their left side from registers.

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
def grad_query_variant(
    architecture: str,
    dtype: torch.dtype,
    head_size: int,
    rule: Rule,
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


@functools.cache
def grad_key_value_variant(
    architecture: str,
    dtype: torch.dtype,
    head_size: int,
    rule: Rule,
    causal: bool,
    window: bool = False,
    softcap: bool = False,
    key_range: bool = False,
    grad_key: bool = True,
    grad_value: bool = True,
    described: bool = False,
    tile: tiles.Tile | None = None,
) -> tiles.Variant:
    """The kernel over key tiles for these options; arguments as in :func:`grad_query_variant`.

    ``"warm"`` and ``"sharp"`` are the same here. Without ``grad_key`` the rule must be ``"constant"``, and with it not.
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


class _Over(NamedTuple):
    """A launch of the kernel over key tiles, and what it writes.

    Args:
        launch: the kernel.
        grad_key, grad_value: whether it writes these gradients.
        parts: shape of the sums of parts, ``[gradients, parts, B, HK, S, D]``; None where there are no parts.
    """

    launch: Launch
    grad_key: bool
    grad_value: bool
    parts: tuple[int, ...] | None


class _Plan(NamedTuple):
    """What the backward does for tensors of given layouts.

    Args:
        over_queries: the launch of the kernel over query tiles, None where nothing asks for it.
        over_keys: those of the kernel over key tiles.
        writes: whether a kernel writes the gradients of query, key, value and sinks.
        copies_first: whether grad_out, query, key or value must be copied before.
        copies: whether the gradient of query, key or value is written elsewhere, and must be copied afterwards.
        hand_over, norm: whether the first kernel writes for the second, and whether a norm is part of that.
    """

    over_queries: Launch | None
    over_keys: tuple[_Over, ...]
    writes: tuple[bool, bool, bool, bool]
    copies_first: bool
    copies: bool
    hand_over: bool
    norm: bool


def _key_launches(
    read: dict[str, torch.Tensor],
    architecture: str,
    places: tuple[torch.Tensor, torch.Tensor],
    writes: tuple[bool, bool],
    rule: Rule,
    mask: tuple[bool, bool, bool],
    key_range: bool,
    by_descriptor: bool,
    common: dict[str, Any],
    factors: tuple[float, float],
) -> tuple[_Over, ...]:
    """The launches over key tiles; ``places`` have the layouts of the gradients of key and value."""
    query, key = read["query"], read["key"]
    batch, key_heads, keys, size = key.shape
    causal, window, capped = mask
    together = tiles.attention_tile("grad_key_value", architecture, size, query.dtype, capped, by_descriptor)
    launches = [writes]
    if all(writes) and together.split:
        launches = [(False, True), (True, False)]
    found = []
    for grad_key, grad_value in launches:
        if not grad_key and not grad_value:
            continue
        variant = grad_key_value_variant(
            architecture,
            query.dtype,
            size,
            rule if grad_key else "constant",
            causal,
            window,
            capped,
            key_range,
            grad_key,
            grad_value,
            by_descriptor,
        )
        block_t, block_s = variant.constants["BLOCK_T"], variant.constants["BLOCK_S"]
        tiles_s, columns, group = triton.cdiv(keys, block_s), batch * key_heads, common["group"]
        members = members_of(query.shape[2], keys, common["window"], causal, block_t, block_s, columns, group)
        parts = group // members
        shape = (grad_key + grad_value, parts, *key.shape) if parts > 1 else None
        # Sums of parts are contiguous.
        to_key, to_value = places if shape is None else (torch.empty(key.shape, device="meta"),) * 2
        launch = Launch(
            variant,
            tiles_s * columns * parts,
            **common,
            **matrices(variant, **read),
            **strides("grad_key", to_key, "s"),
            **strides("grad_value", to_value, "s"),
            grad_stride_part=key.numel(),
            members=members,
            section=key_section(tiles_s, members, query, columns * parts, causal),
            key_factor=factors[0],
            value_factor=factors[1],
        )
        found.append(_Over(launch, grad_key, grad_value, shape))
    return tuple(found)


@Plans
def backward_plans(
    tensors: tuple[torch.Tensor, ...],
    options: Options,
    softmax_backward: str,
    temperature: float,
    grad_scale: tuple[float, float, float],
    needs: tuple[bool, bool, bool, bool],
) -> _Plan:
    """The plan for grad_out, query, key, value, sinks, key range and out; the rest as :func:`attention_backward`."""
    grad_out, query, key, value, sinks, key_range, out = tensors
    check_attention(query, key, value)
    need_query, need_key, need_value, need_sinks = needs
    rule, temperature = rule_of(softmax_backward, temperature, query.dtype, need_sinks)
    # A gradient that nothing reaches is 0 without any work.
    reached = query.numel() > 0
    scored = reached and rule != "constant"
    writes = (
        need_query and scored,
        need_key and scored and key.numel() > 0,
        need_value and reached and key.numel() > 0,
        need_sinks and scored,
    )
    # As the gradients are; where their rows cannot be walked, as what takes their place.
    places = [torch.empty_like(x, device="meta") for x in (query, key, value)]
    copies = any(write and not readable(place) for write, place in zip(writes, places, strict=False))
    to_query, to_key, to_value = (as_walked(place) for place in places)

    architecture = tiles.architecture_of(query)
    named = {"grad_out": grad_out, "query": query, "key": key, "value": value}
    read = {name: as_walked(x) for name, x in named.items()}
    batch, heads, queries, size = query.shape
    factor, inner = score_factors(options)
    window = hiding_window(options, key.shape[2])
    by_descriptor = described(architecture, inner, key_range, *read.values())
    common: dict[str, Any] = {
        "heads": heads,
        "group": heads // key.shape[1],
        "queries": queries,
        "keys": key.shape[2],
        "window": window,
        "factor": factor,
        "inner": inner,
        "inverse_temperature": 1.0 / temperature,
    }
    mask = (options.causal, window is not None, inner is not None)
    over_queries = None
    if writes[0] or writes[1] or writes[3]:
        variant = grad_query_variant(
            architecture,
            query.dtype,
            size,
            rule,
            *mask,
            None if sinks is None else sinks.dtype,
            key_range is not None,
            writes[0],
            writes[3],
            writes[1],
            by_descriptor,
        )
        tiles_t = triton.cdiv(queries, variant.constants["BLOCK_T"])
        over_queries = Launch(
            variant,
            tiles_t * batch * heads,
            **common,
            **matrices(variant, **read),
            section=query_section(tiles_t, query, key, options.causal),
            **strides("out", out, "t"),
            **strides("grad_query", to_query, "t"),
            grad_factor=options.scale * grad_scale[0],
        )
    over_keys = _key_launches(
        read,
        architecture,
        (to_key, to_value),
        (writes[1], writes[2]),
        rule,
        mask,
        key_range is not None,
        by_descriptor,
        common,
        (options.scale * grad_scale[1], grad_scale[2]),
    )
    copies_first = not all(map(readable, tensors[:4]))
    return _Plan(over_queries, over_keys, writes, copies_first, copies, writes[1], rule != "exact")


def attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    *,
    softmax_backward: str,
    temperature: float,
    grad_scale: tuple[float, float, float],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """See :class:`gim_kernels.types.AttentionEngine`; nothing is read back to the host.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gim_kernels.triton.launch.check_attention`.

    Numerics: scores, row sums and gradients accumulate in float32; both score matrices are rounded to query's dtype
        for their products; deterministic, bit for bit.
    """
    needs = (*needs[:3], needs[3] and sinks is not None)
    tensors = (grad_out, query, key, value, sinks, key_range, out)
    plan = backward_plans(tensors, options, softmax_backward, temperature, grad_scale, needs)
    inputs = (query, key, value, sinks)
    grads: list[torch.Tensor | None] = [
        None if x is None or not need else torch.empty_like(x) if write and i < 3 else torch.zeros_like(x)
        for i, (x, need, write) in enumerate(zip(inputs, needs, plan.writes, strict=True))
    ]
    # Where the kernels write: gradients, or memory whose rows have unit stride; the sinks' for each query.
    to = [grad if write else None for grad, write in zip(grads, plan.writes, strict=True)]
    if plan.copies:
        to[:3] = [x if x is None or readable(x) else x.new_empty(x.shape) for x in to[:3]]
    if plan.writes[3]:
        to[3] = torch.empty_like(lse)
    read = [grad_out, query, key, value]
    if plan.copies_first:
        read = list(map(unit_stride, read))
    sinks, key_range = contiguous(sinks), contiguous(key_range)
    rows = [torch.empty_like(lse) if plan.hand_over and (i != 1 or plan.norm) else None for i in range(3)]
    with guard(query):
        if plan.over_queries is not None:
            plan.over_queries(*read, sinks, key_range, out, lse, to[0], to[3], *rows)
        for launch, has_key, has_value, shape in plan.over_keys:
            places = (to[1] if has_key else None, to[2] if has_value else None)
            # Without parts nothing is written to the sums.
            partial = None if shape is None else torch.empty(shape, dtype=torch.float32, device=key.device)
            handed = rows if has_key else (lse, None, None)
            launch(*read, key_range, *places, lse if partial is None else partial, *handed)
            if partial is not None:
                for sums, whole in zip(partial, [place for place in places if place is not None], strict=True):
                    fold_parts(sums, whole)
    if plan.copies:
        for grad, written in zip(grads[:3], to, strict=False):
            if grad is not None and written is not None and written is not grad:
                grad.copy_(written)
    if grads[3] is not None and to[3] is not None:
        grads[3].copy_(to[3].sum((0, 2)))
    return grads[0], grads[1], grads[2], grads[3]
