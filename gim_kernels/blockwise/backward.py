"""Attention's backward under the three softmax rules, a block of queries at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gim_kernels.blockwise.tiles import (
    Block,
    Buffers,
    blocks,
    hide,
    is_matrix,
    matrix,
    ranges_of,
    scores_of,
    tile_of,
    wide_dtype,
)
from gim_kernels.types import Options


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


def _shared(ranges: list[tuple[int, int]], *tensors: torch.Tensor) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """The rows of a batch and their keys; together where all rows are one, and only their gradients differ."""
    rows = list(range(len(ranges)))
    if len(set(ranges)) == 1 and all(x.stride(0) == 0 for x in tensors):
        yield rows, ranges[0]
    else:
        yield from (([row], keys) for row, keys in zip(rows, ranges, strict=True))


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


def _scores_and_slope(
    query: torch.Tensor, key: torch.Tensor, options: Options, buffers: Buffers, into: torch.Tensor
) -> torch.Tensor | None:
    """The scores, written into ``into``, and under a softcap their slope ``1 - (S / c)^2``; else None.

    The slope comes from the tanh: where that is nearly 1, the rounding of ``c tanh`` would be most of the difference.
    """
    if options.softcap is None:
        scores_of(query, key, options, into)
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
    buffers: Buffers,
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
    buffers: Buffers,
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
        hide(scores.view(cube), block, options)
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
    return grad.dtype == wide and is_matrix(grad)


def _sums(grad: torch.Tensor | None, row: int, kv_head: slice, wide: torch.dtype) -> torch.Tensor | None:
    """Where a gradient ``[B, HK, S, D]`` of zeros is summed for some heads: in place, or in a copy."""
    if grad is None:
        return None
    own = grad[row, kv_head]
    if _sums_in_place(grad, wide):
        return own
    return torch.zeros_like(own, dtype=wide, memory_format=torch.contiguous_format)


class _Work(NamedTuple):
    """A backward: what it is of, and where the gradients go, None of those that are not wanted.

    Args:
        tensors: grad_out, query, key, value, sinks, lse.
        options, temperature: of the softmax.
        factors: of the gradients of query, key and value.
        through_scores: whether the gradient of the scores is needed.
        grad_query, grad_key, grad_value, grad_sinks: zeros; the last ``[HQ]`` in wide numbers.
    """

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]
    options: Options
    temperature: float
    factors: tuple[float, float, float]
    through_scores: bool
    grad_query: torch.Tensor | None
    grad_key: torch.Tensor | None
    grad_value: torch.Tensor | None
    grad_sinks: torch.Tensor | None


def _add_heads(
    work: _Work, rows: list[int], keys: tuple[int, int], kv_head: slice, step: int, buffers: Buffers
) -> None:
    """Add what some key heads of rows of one prompt give, ``step`` queries at a time.

    Whatever is copied here is gone before the next heads' copies are made.
    """
    _, query, key, value, sinks, _ = work.tensors
    wide, row = buffers.dtype, rows[0]
    group = query.shape[1] // key.shape[1]
    head = slice(kv_head.start * group, kv_head.stop * group)
    k, v = matrix(key[row, kv_head], wide), matrix(value[row, kv_head], wide)  # [HEADS, S, D]
    sink = None if sinks is None else sinks[head].to(wide)[:, None, None]  # [HEADS * G, 1, 1]
    grad_key = work.grad_key if work.through_scores else None
    sums_key = [_sums(grad_key, one, kv_head, wide) for one in rows]
    sums_value = [_sums(work.grad_value, one, kv_head, wide) for one in rows]
    for block in blocks(query.shape[2], key.shape[2], work.options, *keys, step):
        if block.keys:
            seen = slice(block.first, block.end)
            sums = [
                (to_key if to_key is None else to_key[:, seen], to_value if to_value is None else to_value[:, seen])
                for to_key, to_value in zip(sums_key, sums_value, strict=True)
            ]
            _add_block(work, rows, head, block, k[:, seen], v[:, seen], sink, sums, buffers)
    for of_all, all_sums in ((work.grad_key, sums_key), (work.grad_value, sums_value)):
        for one, own in zip(rows, all_sums, strict=True):
            if own is not None and of_all is not None and not _sums_in_place(of_all, wide):
                of_all[one, kv_head] = own


def _add_block(
    work: _Work,
    rows: list[int],
    head: slice,
    block: Block,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor | None,
    sums: list[tuple[torch.Tensor | None, torch.Tensor | None]],
    buffers: Buffers,
) -> None:
    """Add what the queries of a block give, of the heads of ``k`` and ``v`` ``[HEADS, KEYS, D]``, to the gradients.

    ``sums`` are those of key and value ``[HEADS, KEYS, D]`` for each of the rows.
    """
    grad_out, query, _, _, _, lse = work.tensors
    at, length, size = slice(block.start, block.stop), block.stop - block.start, query.shape[3]
    count, heads = k.shape[0], head.stop - head.start
    q = matrix(query[rows[0], head, at].reshape(count, -1, size), buffers.dtype)  # [HEADS, G * ROWS, D]
    row_lse = lse[rows[0], head, at].reshape(count, -1, 1)
    sink_score = None if sink is None else sink.expand(-1, length, 1).reshape(row_lse.shape)
    value_path = work.grad_value is not None
    weights = _weights(q, k, row_lse, sink_score, work.temperature, work.options, block, buffers, value_path)
    e, z = weights.e, weights.z
    grads = [matrix(grad_out[one, head, at].reshape(q.shape), buffers.dtype) for one in rows]
    for grad, (_, sum_value) in zip(grads, sums, strict=True):
        if sum_value is not None:
            # Rows sum to 1 but for the rounding of lse, which dividing by their sum takes out again.
            sum_value.baddbmm_(weights.p.mT, grad / weights.p_sum, alpha=work.factors[2])
    if not work.through_scores:
        return
    # From here on P's buffer is dP's.
    q_over_z = q / z
    for one, grad, (sum_key, _) in zip(rows, grads, sums, strict=True):
        grad_p = torch.bmm(grad, v.mT, out=buffers.get("p or dp", *e.shape)).mul_(e)
        delta = grad_p.sum(-1, keepdim=True) / z
        if work.grad_sinks is not None and weights.share is not None:
            work.grad_sinks[head] -= (weights.share * delta / z).view(heads, length).sum(-1)
        grad_s = grad_p.addcmul_(e, delta, value=-1.0)  # still without the factor 1 / Z of its row
        if weights.slope is not None:
            grad_s.mul_(weights.slope)
        if work.grad_query is not None:
            grad_q = torch.bmm(grad_s, k).div_(z).mul_(work.factors[0])
            work.grad_query[one, head, at] = grad_q.view(heads, length, size)
        if sum_key is not None:
            sum_key.baddbmm_(grad_s.mT, q_over_z, alpha=work.factors[1])


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
    heads, (kv_heads, keys) = query.shape[1], key.shape[1:3]
    wide = wide_dtype(query.dtype)
    need_query, need_key, need_value, need_sinks = needs
    # A constant softmax passes no gradient on, so these are 0 without any work.
    through_scores = softmax_backward != "constant" and (need_query or need_key or need_sinks)
    work = _Work(
        (grad_out, query, key, value, sinks, lse),
        options,
        temperature if softmax_backward == "temperature" else 1.0,
        (options.scale * grad_scale[0], options.scale * grad_scale[1], grad_scale[2]),
        through_scores,
        torch.zeros_like(query) if need_query else None,
        torch.zeros_like(key) if need_key else None,
        torch.zeros_like(value) if need_value else None,
        torch.zeros(heads, dtype=wide, device=query.device) if need_sinks else None,
    )
    tile = tile_of(query.shape[2], keys, kv_heads, heads // kv_heads, options)
    buffers = Buffers(tile.scores, wide, query.device)
    for rows, seen in _shared(ranges_of(key_range, query.shape[0], keys), query, key, value, lse):
        for first in range(0, kv_heads, tile.heads):
            _add_heads(work, rows, seen, slice(first, min(first + tile.heads, kv_heads)), tile.queries, buffers)
    grad_sinks = None if work.grad_sinks is None or sinks is None else work.grad_sinks.to(sinks.dtype)
    return work.grad_query, work.grad_key, work.grad_value, grad_sinks


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
    (heads, queries, size), (kv_heads, keys), wide = query.shape[1:], key.shape[1:3], wide_dtype(query.dtype)
    tile = tile_of(queries, keys, kv_heads, heads // kv_heads, options)
    through_scores = softmax_backward != "constant"
    second = through_scores or (softmax_backward == "temperature" and temperature != 1.0)
    buffers = 1 + second + (options.softcap is not None)
    # Copies of the heads' keys and values, and the sums of their gradients.
    copies = sum(keys for x in (key, value) if x.dtype != wide or not is_matrix(x))
    for x in (key, value) if through_scores else (value,):
        copies += 0 if _sums_in_place(torch.empty_like(x, device="meta"), wide) else together * keys
    copies += (together + 4) * tile.rows
    return tile.heads * (buffers * tile.rows * tile.keys + copies * size) * wide.itemsize
