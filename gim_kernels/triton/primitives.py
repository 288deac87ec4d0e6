"""What the attention kernels are made of: tiles of rows, ranges of a mask, scores in base 2."""

from __future__ import annotations

import triton
import triton.language as tl

#: log2(e): scores times this are in base 2.
LOG2E = tl.constexpr(1.4426950408889634)
#: log(2): a base-2 logarithm times this is natural.
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def matrix_of(tensor, batch, head, stride_b, stride_h):
    """The matrix ``[rows, D]`` of one head of a tensor ``[B, H, rows, D]``, as :func:`load_rows` takes it.

    A tensor is a pointer and strides, or a descriptor and None for each stride: kernels do not say the type of these
    strides, or triton would take None for a number.
    """
    if stride_h is None:
        matrix = (tensor, batch.to(tl.int32), head.to(tl.int32))
    else:
        matrix = tensor + batch * stride_b + head * stride_h
    return matrix


@triton.jit
def matrix_after(matrix, heads, stride_h):
    """The matrix that lies ``heads`` heads further on."""
    if stride_h is None:
        descriptor, batch, head = matrix
        found = (descriptor, batch, head + heads)
    else:
        found = matrix + heads.to(tl.int64) * stride_h
    return found


@triton.jit
def load_rows(
    matrix,
    start,
    stride,
    first,
    end,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Rows ``start : start + ROWS`` of a matrix with ``HEAD_SIZE`` columns, ``[ROWS, BLOCK_D]``.

    0 past the last column and, with ``CHECK_ROWS``, outside the rows ``first : end``; ``first`` None is the first of
    all. A descriptor, which has no ``stride``, knows its rows itself: ``first : end`` must be all of them.
    """
    if stride is None:
        descriptor, batch, head = matrix
        tile = tl.reshape(descriptor.load([batch, head, start, 0]), [ROWS, BLOCK_D])
    else:
        row = tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK_D)
        # [ROWS, BLOCK_D]
        tile_ptr = matrix + start.to(tl.int64) * stride + (row[:, None] * tl.cast(stride, tl.int32) + column[None, :])
        if CHECK_ROWS:
            seen = start + row < end
            if first is not None:
                seen = seen & (start + row >= first)
            if HEAD_SIZE == BLOCK_D:
                tile = tl.load(tile_ptr, mask=seen[:, None], other=0.0)
            else:
                tile = tl.load(tile_ptr, mask=seen[:, None] & (column[None, :] < HEAD_SIZE), other=0.0)
        else:
            if HEAD_SIZE == BLOCK_D:
                tile = tl.load(tile_ptr)
            else:
                tile = tl.load(tile_ptr, mask=column[None, :] < HEAD_SIZE, other=0.0)
    return tile


@triton.jit
def load_vector(vector_ptr, row, end, other, CHECK_ROWS: tl.constexpr):
    """Entries ``row`` of a vector; with ``CHECK_ROWS``, ``other`` from ``end`` on."""
    entry_ptr = vector_ptr + row
    return tl.load(entry_ptr, mask=row < end, other=other) if CHECK_ROWS else tl.load(entry_ptr)


@triton.jit
def store_rows(
    matrix_ptr,
    tile,
    start,
    stride,
    end,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write ``tile`` ``[ROWS, BLOCK_D]`` to the rows ``start : start + ROWS`` that lie before ``end``."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    # [ROWS, BLOCK_D]
    tile_ptr = matrix_ptr + start.to(tl.int64) * stride + (row[:, None] * stride.to(tl.int32) + column[None, :])
    mask = (start + row < end)[:, None] & (column[None, :] < HEAD_SIZE)
    tl.store(tile_ptr, tile.to(matrix_ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_bounds(key_range_ptr, batch, keys):
    """First and one-past-last key of a row of the batch, within ``0 : keys``."""
    if key_range_ptr is None:
        first = keys * 0
        end = keys
    else:
        first = tl.maximum(tl.load(key_range_ptr + batch * 2), 0)
        end = tl.minimum(tl.load(key_range_ptr + batch * 2 + 1), keys)
    return first, end


@triton.jit
def _split(low, full_low, full_high, high, BLOCK: tl.constexpr):
    """Tiles of ``low : high``: how many need a mask on the left, where the full ones lie, how many on the right.

    ``full_low : full_high`` is what every row of the other side sees.

    Returns:
        ``low`` rounded to a tile, begin and end of the full tiles, number of masked tiles left and right of them.
    """
    high = tl.maximum(high, low)
    low = low // BLOCK * BLOCK
    full_low = (tl.maximum(full_low, low) + BLOCK - 1) // BLOCK * BLOCK
    full_high = tl.minimum(tl.maximum(full_high, 0), high) // BLOCK * BLOCK
    # Without a full tile every tile counts as one on the right.
    none = full_low >= full_high
    full_low = tl.where(none, low, full_low)
    full_high = tl.where(none, low, full_high)
    left = (full_low - low) // BLOCK
    right = (high - full_high + BLOCK - 1) // BLOCK
    return low, full_low, full_high, left, right


@triton.jit
def visible_keys(
    start_t,
    queries,
    keys,
    first,
    end,
    window,
    CAUSAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The key tiles that the queries ``start_t : start_t + BLOCK_T`` see, as :func:`_split` gives them.

    Query ``i`` stands at key position ``p = i + keys - queries`` and sees the keys ``j`` in ``first : end`` with
    ``j <= p`` (causal) and ``j > p - window``.
    """
    top = start_t + keys - queries  # position of the first query
    bottom = tl.minimum(start_t + BLOCK_T, queries) - 1 + keys - queries  # of the last
    low = first
    high = end
    full_low = first
    full_high = end
    if CAUSAL:
        high = tl.minimum(high, bottom + 1)
        full_high = tl.minimum(full_high, top + 1)
    if window is not None:
        low = tl.maximum(low, top - window + 1)
        full_low = tl.maximum(full_low, bottom - window + 1)
    return _split(low, full_low, full_high, high, BLOCK_S)


@triton.jit
def visible_queries(
    start_s,
    queries,
    keys,
    first,
    end,
    window,
    CAUSAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The query tiles that see some of the keys ``start_s : start_s + BLOCK_S``; see :func:`visible_keys`.

    ``first`` and ``end`` only decide whether the tile is seen at all: keys are independent of each other, so those that
    do not exist are erased once, when the gradients are written.
    """
    top = start_s - (keys - queries)  # the query that stands on the first key
    bottom = tl.minimum(start_s + BLOCK_S, keys) - 1 - (keys - queries)  # on the last
    low = top * 0
    high = queries
    full_low = top * 0
    full_high = queries
    if CAUSAL:
        low = tl.maximum(low, top)
        full_low = tl.maximum(full_low, bottom)
    if window is not None:
        high = tl.minimum(high, bottom + window)
        full_high = tl.minimum(full_high, top + window)
    exists = (start_s < end) & (start_s + BLOCK_S > first)
    high = tl.where(exists, high, low)
    full_high = tl.where(exists, full_high, low)
    return _split(low, full_low, full_high, high, BLOCK_T)


@triton.jit
def tiles_in(span, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles of a span, as :func:`_split` gives it, are full, or with ``MASKED`` need a mask."""
    _low, full_low, full_high, left, right = span
    count = left + right
    if not MASKED:
        count = (full_high - full_low) // BLOCK
    return count


@triton.jit
def tile_start(i, span, MASKED: tl.constexpr, LEFT: tl.constexpr, BLOCK: tl.constexpr):
    """Start of the ``i``-th full tile, or of the ``i``-th that needs a mask.

    Of the latter those left of the full tiles come first; without ``LEFT`` there are none.
    """
    low, full_low, full_high, left, _right = span
    if MASKED:
        start = full_high + i * BLOCK
        if LEFT:
            start = tl.where(i < left, low + i * BLOCK, start - left * BLOCK)
    else:
        start = full_low + i * BLOCK
    return start


@triton.jit
def sees(position, key, first, end, window, CAUSAL: tl.constexpr):
    """Whether the queries at key positions ``position`` see the keys ``key``; the two broadcast to a tile.

    With ``first`` None all keys up to ``end`` count, and causality hides those past it: a query stands on a key.
    """
    if CAUSAL:
        mask = key <= position
        if first is not None:
            mask = mask & (key >= first) & (key < end)
    else:
        mask = key < end
        if first is not None:
            mask = mask & (key >= first)
    if window is not None:
        mask = mask & (key > position - window)
    return mask


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Hyperbolic tangent of float32; absolute error 2e-7, with ``PRECISE`` relative error 3e-7 around 0 as well."""
    # exp2 of 2 log2(e) x overflows to inf and underflows to 0: the quotient is right at both ends.
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if PRECISE:
        # Where the difference above cancels, x + x^3 p(x^2): a least-squares fit, relative error 1e-7.
        square = x * x
        series = -0.05267474002877924 + square * 0.016448217493637365
        series = -0.33332942241148467 + square * (0.13320713411690002 + square * series)
        y = tl.where(square < 0.3, x + x * square * series, y)
    return y


@triton.jit
def raw_scores(left, right, inner, PRECISE: tl.constexpr):
    """``left @ right``; with a softcap ``tanh(inner * left @ right)``, ``inner = scale / softcap``.

    Times the caller's ``factor`` this is the score in base 2, ``log2(e) * S'``: ``factor`` is ``scale * log2(e)`` or
    ``softcap * log2(e)``.
    """
    raw = tl.dot(left, right, input_precision="ieee")
    if inner is not None:
        raw = tanh(raw * inner, PRECISE)
    return raw
