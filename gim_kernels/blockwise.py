"""Attention in O(T) memory in plain PyTorch: what runs wherever there is no GPU.

A block of queries holds all the keys it sees, so one softmax row is always whole: the backward needs no second
pass for its row sums and does five matrix products, as many as the ordinary gradient. Key and query ranges that
the mask leaves empty are never visited. Only the output and one log-sum-exp per row are kept between the passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gim_kernels.told import tell
from gim_kernels.types import Options

#: Rows of scores of one key head (query block times the query heads of its group). 64 to 256 rows were within 10 %
#: of each other on a 2-core x86-64 machine (T = 4096, D = 64, float32); more rows only cost memory.
ROWS = 128
#: Scores held at once, to which a block takes key heads together: threads then work on a head each, and a short row
#: costs fewer calls. Two heads are taken where the next limit allows it. On the same machine, half as many took a tenth
#: longer, and twice as many no less.
SCORES = 1 << 21
#: No score buffer holds more elements than this; longer key ranges get fewer rows, at least MIN_BLOCK queries.
MAX_ELEMENTS = 1 << 23
MIN_BLOCK = 16


class Block(NamedTuple):
    """Queries ``start:stop`` of one row of the batch and the keys ``first:end`` that any of them sees.

    ``offset`` is the key position of query 0; ``partial`` tells that some query does not see all of the keys.
    """

    start: int
    stop: int
    first: int
    end: int
    offset: int
    partial: bool

    @property
    def keys(self) -> int:
        """How many keys the block holds; 0 for a block that sees nothing."""
        return max(0, self.end - self.first)


def blocks(queries: int, keys: int, options: Options, first: int, end: int, block: int) -> Iterator[Block]:
    """The query blocks of one row of the batch, each with the tightest key range of its mask."""
    offset = keys - queries
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        low, high = first, end
        if options.causal:
            high = min(high, stop + offset)
        if options.window is not None:
            low = max(low, start + offset - options.window + 1)
        partial = (options.causal and high - 1 > start + offset) or (
            options.window is not None and low <= stop - 1 + offset - options.window
        )
        yield Block(start, stop, low, high, offset, partial)


def _erase_hidden(scores: torch.Tensor, block: Block, options: Options) -> None:
    """Set to 0, in place, every entry of ``scores`` ``[H, BLOCK, KEYS]`` whose key its query does not see."""
    position = block.start + block.offset  # the key position of the block's first query
    if options.causal:
        column = max(block.first, position)  # every query sees the keys up to its first query's position
        if column < block.end:
            scores[..., column - block.first :].tril_(position - column)
    if options.window is not None:
        # Query row i sees key j where j > position + i - window; only the first columns can be hidden.
        column = min(block.end, block.stop - 1 + block.offset - options.window + 1)
        if column > block.first:
            shift = position - options.window + 1 - block.first
            scores[..., : column - block.first].triu_(shift)


def _hide(scores: torch.Tensor, block: Block, options: Options) -> None:
    """Set to -inf, in place, every entry of ``scores`` ``[H, BLOCK, KEYS]`` whose key its query does not see."""
    position = torch.arange(block.start, block.stop, device=scores.device)[:, None] + block.offset
    if options.causal:
        column = max(block.first, block.start + block.offset)
        if column < block.end:
            key = torch.arange(column, block.end, device=scores.device)
            scores[..., column - block.first :].masked_fill_(key > position, -math.inf)
    if options.window is not None:
        column = min(block.end, block.stop + block.offset - options.window)
        if column > block.first:
            key = torch.arange(block.first, column, device=scores.device)
            scores[..., : column - block.first].masked_fill_(key <= position - options.window, -math.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which scores and sums are kept: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


class Tile(NamedTuple):
    """What a block holds at once: ``heads`` key heads, ``queries`` of each query head, at most ``keys`` keys."""

    heads: int
    queries: int
    keys: int
    group: int

    @property
    def rows(self) -> int:
        """Rows of scores of one key head."""
        return self.queries * self.group

    @property
    def scores(self) -> int:
        """Elements of one buffer of scores."""
        return self.heads * self.rows * self.keys


def tile_of(queries: int, keys: int, kv_heads: int, group: int, options: Options) -> Tile:
    """The tile of an attention of T and S, HK key heads and ``group`` query heads for each of them."""
    rows = min(ROWS, max(1, MAX_ELEMENTS // max(1, keys)))
    block = min(max(MIN_BLOCK, rows // group), max(1, queries))
    if options.causal and options.window is not None:
        keys = min(keys, options.window + block - 1)
    one = max(1, group * block * keys)
    heads = max(SCORES // one, min(2, MAX_ELEMENTS // one), 1)
    return Tile(min(heads, kv_heads), block, keys, group)


def _ranges(key_range: torch.Tensor | None, batch: int, keys: int) -> list[tuple[int, int]]:
    """First and one-past-last key of each row of the batch, as integers within ``0..keys``."""
    if key_range is None:
        return [(0, keys)] * batch
    return [(max(0, int(first)), min(keys, int(end))) for first, end in key_range.tolist()]


def _shared(ranges: list[tuple[int, int]], *tensors: torch.Tensor) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """The rows of a batch and their keys; together where all rows are one, and only their gradients differ."""
    rows = list(range(len(ranges)))
    if len(set(ranges)) == 1 and all(x.stride(0) == 0 for x in tensors):
        yield rows, ranges[0]
    else:
        yield from (([row], keys) for row, keys in zip(rows, ranges, strict=True))


def _is_matrix(x: torch.Tensor) -> bool:
    """Whether the last two dimensions of ``x`` ``[.., N, D]`` lie in memory as BLAS takes them, by rows or by columns.

    What does not, it would copy at every product.
    """
    (rows, columns), (row, column) = x.shape[-2:], x.stride()[-2:]
    return (column == 1 and (row >= columns or rows == 1)) or (row == 1 and (column >= rows or columns == 1))


def _matrix(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """``x`` in wide numbers and as :func:`_is_matrix` wants it: itself where it is so already, else one copy."""
    if _is_matrix(x):
        return x.to(wide)
    return x.to(wide, memory_format=torch.contiguous_format).contiguous()


def _walkable(x: torch.Tensor) -> bool:
    """Whether torch's own kernel can walk ``x`` ``[B, H, T, D]``.

    It steps by 1 within a row, whatever the stride says: ``scaled_dot_product_attention`` takes it only where the last
    dimension's is 1. Beyond that, BLAS wants rows that do not overlap, and the kernel lays its output out like the
    query, which gives unit steps in a row only where all other dimensions step over a row, or not at all.
    """
    width = x.shape[-1]
    *outer, row, column = x.stride()
    return (
        column == 1
        and (row >= width or x.shape[-2] == 1)
        and all(step >= width or step == 0 or count == 1 for step, count in zip(outer, x.shape, strict=False))
    )


def _for_torch(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where torch's own kernel can walk it, a contiguous copy elsewhere."""
    return x if _walkable(x) else x.clone(memory_format=torch.contiguous_format)


class _Buffers:
    """Score buffers reused by every block, so that a pass allocates each once."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._new = lambda: torch.empty(elements, dtype=dtype, device=device)
        self._flat: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, *tuple[int, ...]], torch.Tensor] = {}

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of ``shape`` in the buffer ``name``; what it held before is lost."""
        found = self._views.get((name, *shape))
        if found is None:
            if name not in self._flat:
                self._flat[name] = self._new()
            found = self._views[name, *shape] = self._flat[name][: math.prod(shape)].view(shape)
        return found


def _fused_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own CPU flash attention, which returns the output and the natural log-sum-exp."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=options.scale
    )
    return out, lse.contiguous()  # it comes as a view of [B, T, H]


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :class:`gim_kernels.types.AttentionEngine`; where torch's own CPU kernel has the options, that."""
    tell("blockwise")
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wide = _wide(query.dtype)
    # The layout torch's own CPU kernel returns: the next op reshapes [B, T, H, D] without a copy.
    out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=wide, device=query.device)
    plain = query.device.type == "cpu" and runs_torchs_kernel(query, key, options, sinks is None)
    causal = options.causal and queries > 1
    if plain:
        query, key, value = _for_torch(query), _for_torch(key), _for_torch(value)
    if plain and key_range is None and keys > 0:
        return _fused_forward(query, key, value, options, causal)
    for row, (first, end) in enumerate(_ranges(key_range, batch, keys)):
        one = slice(row, row + 1)
        if plain and first < end:
            k, v = key[one, :, first:end], value[one, :, first:end]
            # Queries before `first` see nothing; those in first..end a square; those after `end` every key.
            square = slice(first, end) if causal else slice(0, queries)
            out[one, :, square], lse[one, :, square] = _fused_forward(query[one, :, square], k, v, options, causal)
            if causal and first > 0:
                out[one, :, :first] = 0
                lse[one, :, :first] = math.inf
            if causal and end < queries:
                out[one, :, end:], lse[one, :, end:] = _fused_forward(query[one, :, end:], k, v, options, False)
            continue
        group = heads // kv_heads
        tile = tile_of(queries, keys, kv_heads, group, options)
        buffers = _Buffers(tile.scores, wide, query.device)
        for first_head in range(0, kv_heads, tile.heads):
            kv_head = slice(first_head, min(first_head + tile.heads, kv_heads))
            count = kv_head.stop - kv_head.start
            head = slice(kv_head.start * group, kv_head.stop * group)
            k, v = _matrix(key[row, kv_head], wide), _matrix(value[row, kv_head], wide)  # [HEADS, S, D]
            sink = None if sinks is None else sinks[head].to(wide)[:, None, None]  # [HEADS * G, 1, 1]
            for block in blocks(queries, keys, options, first, end, tile.queries):
                rows = slice(block.start, block.stop)
                length = block.stop - block.start
                if block.keys == 0:
                    out[row, head, rows] = 0
                    lse[row, head, rows] = math.inf if sink is None else sink[..., 0]
                    continue
                q = _matrix(query[row, head, rows].reshape(count, group * length, size), wide)
                seen = slice(block.first, block.end)
                scores = _scores(q, k[:, seen], options, buffers.get("s", count, group * length, block.keys))
                scores = scores.view(count * group, length, block.keys)
                if block.partial:
                    _hide(scores, block, options)
                top = scores.amax(-1, keepdim=True)  # [HEADS * G, BLOCK, 1]
                if sink is not None:
                    top = torch.maximum(top, sink)
                top.masked_fill_(top == -math.inf, 0.0)
                scores.sub_(top).exp_()
                total = scores.sum(-1, keepdim=True)
                if sink is not None:
                    total += torch.exp(sink - top)
                weighted = scores.view(count, group * length, block.keys) @ v[:, seen]
                empty = total == 0
                normaliser = total.masked_fill(empty, 1.0)
                out[row, head, rows] = (weighted.view(count * group, length, size) / normaliser).to(out.dtype)
                lse[row, head, rows] = (top + total.log()).masked_fill(empty, math.inf)[..., 0]
            del k, v  # copies, which would be alive beside the next heads'
    return out, lse


def forward_workspace(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, plain: bool
) -> int:
    """Bytes that :func:`attention_forward` holds besides its arguments and results, at most.

    Args:
        query: ``[B, HQ, T, D]``; only its shape, strides and dtype count, as of ``key`` and ``value``
            ``[B, HK, S, D]``.
        options: scale and mask.
        plain: whether torch's own kernel runs, which holds a few tiles for each thread and nothing that grows, besides
            copies of what it cannot walk.
    """
    if plain:
        return sum(x.numel() * x.itemsize for x in (query, key, value) if not _walkable(x))
    (heads, queries, size), (kv_heads, keys), wide = query.shape[1:], key.shape[1:3], _wide(query.dtype)
    tile = tile_of(queries, keys, kv_heads, heads // kv_heads, options)
    copies = sum(keys for x in (key, value) if x.dtype != wide or not _is_matrix(x))
    return tile.heads * (tile.rows * tile.keys + (copies + 3 * tile.rows) * size) * wide.itemsize


def backward_workspace(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    softmax_backward: str,
    temperature: float,
) -> int:
    """Bytes that :func:`attention_backward` holds besides its arguments and results, at most.

    Args:
        query: ``[B, HQ, T, D]``; only its shape, dtype and whether its rows are one count, and the strides as well of
            ``key`` and ``value`` ``[B, HK, S, D]``.
        options, softmax_backward, temperature: as in the backward.
    """
    together = query.shape[0] if query.stride(0) == 0 else 1
    (heads, queries, size), (kv_heads, keys), wide = query.shape[1:], key.shape[1:3], _wide(query.dtype)
    tile = tile_of(queries, keys, kv_heads, heads // kv_heads, options)
    through_scores = softmax_backward != "constant"
    second = through_scores or (softmax_backward == "temperature" and temperature != 1.0)
    buffers = 1 + second + (options.softcap is not None)
    # Copies of the heads' keys and values, and the sums of their gradients.
    copies = sum(keys for x in (key, value) if x.dtype != wide or not _is_matrix(x))
    for x in (key, value) if through_scores else (value,):
        copies += 0 if _sums_in_place(torch.empty_like(x, device="meta"), wide) else together * keys
    copies += (together + 4) * tile.rows
    return tile.heads * (buffers * tile.rows * tile.keys + copies * size) * wide.itemsize


def runs_torchs_kernel(query: torch.Tensor, key: torch.Tensor, options: Options, plain: bool) -> bool:
    """Whether :func:`attention_forward` is torch's own kernel on a CPU; ``plain`` tells that there are no sinks."""
    queries, keys = query.shape[2], key.shape[2]
    return (
        plain
        and options.window is None
        and options.softcap is None
        and queries > 0
        # It hides keys by a score of -inf and multiplies by the scale, in the type of the scores, afterwards.
        and options.scale >= torch.finfo(_wide(query.dtype)).tiny
        # torch's causal mask starts at the top left; the two agree on squares, and on one query without a mask.
        and (not options.causal or queries in (1, keys))
    )


class _Weights(NamedTuple):
    """Both softmaxes of a block, ``[HEADS, ROWS, KEYS]``, still without the division by their rows' sums.

    ``e`` is the softmax at temperature T, ``z`` ``[HEADS, ROWS, 1]`` its sums and ``share`` the sink's part of them,
    None without sinks; ``p`` is the softmax at T = 1, ``p_sum`` its sums; ``slope`` is the derivative of the softcap,
    None without one. ``p`` lies in the buffer ``"p or dp"``, or is ``e``.
    """

    e: torch.Tensor
    z: torch.Tensor
    share: torch.Tensor | None
    slope: torch.Tensor | None
    p: torch.Tensor
    p_sum: torch.Tensor


def _scores(query: torch.Tensor, key: torch.Tensor, options: Options, into: torch.Tensor) -> torch.Tensor:
    """``softcap(scale * query @ key.T)``, written into ``into`` ``[HEADS, ROWS, KEYS]``."""
    torch.bmm(query, key.mT, out=into)
    if options.softcap is None:
        return into.mul_(options.scale)
    return into.mul_(options.scale / options.softcap).tanh_().mul_(options.softcap)


def _scores_and_slope(
    query: torch.Tensor, key: torch.Tensor, options: Options, buffers: _Buffers, into: torch.Tensor
) -> torch.Tensor | None:
    """The scores, written into ``into``, and under a softcap their slope ``1 - (S / c)^2``; else None.

    The slope comes from the tanh: where that is nearly 1, the rounding of ``c tanh`` would be most of the difference.
    """
    if options.softcap is None:
        _scores(query, key, options, into)
        return None
    slope = torch.bmm(query, key.mT, out=buffers.get("slope", *into.shape))
    slope.mul_(options.scale / options.softcap).tanh_()
    torch.mul(slope, options.softcap, out=into)
    return slope.square_().neg_().add_(1.0)


def _exponentials(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    inverse: float,
    options: Options,
    buffers: _Buffers,
    shape: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``e = exp((S - lse) * inverse)`` and, under a softcap, the slope of the scores; else None."""
    e = buffers.get("e", *shape)
    if options.softcap is None:
        torch.baddbmm(lse, query, key.mT, beta=-inverse, alpha=options.scale * inverse, out=e)
        return e.exp_(), None
    slope = _scores_and_slope(query, key, options, buffers, e)
    return e.sub_(lse).mul_(inverse).exp_(), slope


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    sink: torch.Tensor | None,
    temperature: float,
    options: Options,
    block: Block,
    buffers: _Buffers,
    value_path: bool,
) -> _Weights:
    """Both softmaxes of a block of queries ``[HEADS, ROWS, D]`` over the keys ``[HEADS, KEYS, D]`` that it sees.

    With T = 1 and T = 2 one exponential serves both: ``P = e^T``. For any other T that would not do: below 1 ``e``
    underflows where P does not, and for large T its rounding is multiplied by T. There P has an exponential of its own,
    and the row's largest score takes the place of lse in ``e``, so that Z lies in ``1..KEYS``.

    Args:
        query, key: as above, in wide numbers.
        lse, sink: ``[HEADS, ROWS, 1]``.
        temperature: T.
        options, block: scale and mask.
        buffers: ``"e"``, ``"slope"`` and ``"p or dp"`` are written.
        value_path: whether P is wanted.
    """
    inverse = 1.0 / temperature
    shape = (query.shape[0], query.shape[1], key.shape[1])
    cube = (-1, block.stop - block.start, block.keys)
    if temperature in (1.0, 2.0):
        e, slope = _exponentials(query, key, lse, inverse, options, buffers, shape)
        if block.partial:
            _erase_hidden(e.view(cube), block, options)
        share = None if sink is None else (sink - lse).mul_(inverse).exp_()
        z = _row_sum(e, share)
        if temperature == 1.0 or not value_path:
            return _Weights(e, z, share, slope, e, z)
        p = torch.mul(e, e, out=buffers.get("p or dp", *shape))
        return _Weights(e, z, share, slope, p, _row_sum(p, None if share is None else share.square()))

    scores = buffers.get("p or dp", *shape)
    slope = _scores_and_slope(query, key, options, buffers, scores)
    if block.partial:
        _hide(scores.view(cube), block, options)
    top = scores.amax(-1, keepdim=True)  # [HEADS, ROWS, 1]
    if sink is not None:
        top = torch.maximum(top, sink)
    top.masked_fill_(top == -math.inf, 0.0)
    e = torch.sub(scores, top, out=buffers.get("e", *shape)).mul_(inverse).exp_()
    share = None if sink is None else (sink - top).mul_(inverse).exp_()
    p = scores.sub_(lse).exp_()
    p_sum = _row_sum(p, None if sink is None else (sink - lse).exp_()) if value_path else lse
    return _Weights(e, _row_sum(e, share), share, slope, p, p_sum)


def _row_sum(e: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Sums of rows and their sinks' shares ``[HEADS, ROWS, 1]``; 1 for a row that sees nothing (its entries are 0)."""
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total += sink
    return total.masked_fill_(total == 0, 1.0)


def _sums_in_place(grad: torch.Tensor, wide: torch.dtype) -> bool:
    """Whether a gradient ``[B, HK, S, D]`` can be summed where it lies."""
    return grad.dtype == wide and _is_matrix(grad)


def _sums(grad: torch.Tensor | None, row: int, kv_head: slice, wide: torch.dtype) -> torch.Tensor | None:
    """Where a gradient ``[B, HK, S, D]`` of zeros is summed for some heads: in place, or in a copy."""
    if grad is None:
        return None
    own = grad[row, kv_head]
    if _sums_in_place(grad, wide):
        return own
    return torch.zeros_like(own, dtype=wide, memory_format=torch.contiguous_format)


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
    """See :class:`gim_kernels.types.AttentionEngine`. Where all rows of the batch are one by their strides, and only
    ``grad_out`` differs, weights are computed once for all of them.

    With ``e = exp((S - lse) / T)``, ``Z = rowsum(e)`` (the sink's share included) and ``dP = dO V^T``::

        delta = rowsum(e * dP) / Z
        dS    = e * (dP - delta) / Z          no factor 1 / T
        dV    = P^T dO                        P = exp(S - lse): the value path keeps T = 1
    """
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    group = heads // kv_heads
    wide = _wide(query.dtype)
    constant = softmax_backward == "constant"
    temperature = temperature if softmax_backward == "temperature" else 1.0
    need_query, need_key, need_value, need_sinks = needs
    # A constant softmax passes no gradient on, so these are 0 without any work.
    through_scores = not constant and (need_query or need_key or need_sinks)

    grad_query = torch.zeros_like(query) if need_query else None
    grad_key = torch.zeros_like(key) if need_key else None
    grad_value = torch.zeros_like(value) if need_value else None
    grad_sinks = torch.zeros(heads, dtype=wide, device=query.device) if need_sinks else None

    tile = tile_of(queries, keys, kv_heads, group, options)
    buffers = _Buffers(tile.scores, wide, query.device)
    for row, (first, end) in _shared(_ranges(key_range, batch, keys), query, key, value, lse):
        for first_head in range(0, kv_heads, tile.heads):
            kv_head = slice(first_head, min(first_head + tile.heads, kv_heads))
            count = kv_head.stop - kv_head.start
            head = slice(kv_head.start * group, kv_head.stop * group)
            k, v = _matrix(key[row[0], kv_head], wide), _matrix(value[row[0], kv_head], wide)  # [HEADS, S, D]
            sink = None if sinks is None else sinks[head].to(wide)[:, None, None]  # [HEADS * G, 1, 1]
            sums_key = [_sums(grad_key, one, kv_head, wide) if through_scores else None for one in row]
            sums_value = [_sums(grad_value, one, kv_head, wide) for one in row]
            for block in blocks(queries, keys, options, first, end, tile.queries):
                if block.keys == 0:
                    continue
                rows = slice(block.start, block.stop)
                seen = slice(block.first, block.end)
                length = block.stop - block.start
                flat = (count, group * length, block.keys)
                q = _matrix(query[row[0], head, rows].reshape(count, group * length, size), wide)
                row_lse = lse[row[0], head, rows].reshape(count, group * length, 1)
                sink_score = None if sink is None else sink.expand(-1, length, 1).reshape(row_lse.shape)
                weights = _weights(q, k[:, seen], row_lse, sink_score, temperature, options, block, buffers, need_value)
                e, z = weights.e, weights.z
                grads = [_matrix(grad_out[one, head, rows].reshape(q.shape), wide) for one in row]
                for grad, sum_value in zip(grads, sums_value, strict=True):
                    if sum_value is not None:
                        # Rows sum to 1 but for the rounding of lse, which dividing by their sum takes out again.
                        sum_value[:, seen].baddbmm_(weights.p.mT, grad / weights.p_sum, alpha=grad_scale[2])
                if not through_scores:
                    continue
                # From here on P's buffer is dP's.
                q_over_z = q / z
                for one, grad, sum_key in zip(row, grads, sums_key, strict=True):
                    grad_p = torch.bmm(grad, v[:, seen].mT, out=buffers.get("p or dp", *flat)).mul_(e)
                    delta = grad_p.sum(-1, keepdim=True) / z
                    if grad_sinks is not None and weights.share is not None:
                        grad_sinks[head] -= (weights.share * delta / z).view(count * group, length).sum(-1)
                    grad_s = grad_p.addcmul_(e, delta, value=-1.0)  # still without the factor 1 / Z of its row
                    if weights.slope is not None:
                        grad_s.mul_(weights.slope)
                    if grad_query is not None:
                        grad_q = torch.bmm(grad_s, k[:, seen]).div_(z).mul_(options.scale * grad_scale[0])
                        grad_query[one, head, rows] = grad_q.view(count * group, length, size)
                    if sum_key is not None:
                        sum_key[:, seen].baddbmm_(grad_s.mT, q_over_z, alpha=options.scale * grad_scale[1])
            for all_sums, of_all in ((sums_key, grad_key), (sums_value, grad_value)):
                for one, sums in zip(row, all_sums, strict=True):
                    if sums is not None and of_all is not None and not _sums_in_place(of_all, wide):
                        of_all[one, kv_head] = sums
            del k, v, sums_key, sums_value, all_sums, sums  # copies, which would be alive beside the next heads'
    if grad_sinks is not None and sinks is not None:
        return grad_query, grad_key, grad_value, grad_sinks.to(sinks.dtype)
    return grad_query, grad_key, grad_value, None
