"""Attention's forward: torch's own kernel where that has the options, else a block of queries at a time."""

from __future__ import annotations

import math

import torch

from gim_kernels.blockwise.tiles import (
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
from gim_kernels.told import tell
from gim_kernels.types import Options


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


def _fused_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own CPU flash attention, which returns the output and the natural log-sum-exp."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=options.scale
    )
    return out, lse.contiguous()  # it comes as a view of [B, T, H]


def _by_blocks(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    row: int,
    key_range: tuple[int, int],
    options: Options,
) -> None:
    """One row of the batch, of which ``key_range`` exists, written into ``out`` and ``lse``."""
    (heads, queries, size), (kv_heads, keys), wide = query.shape[1:], key.shape[1:3], lse.dtype
    group = heads // kv_heads
    tile = tile_of(queries, keys, kv_heads, group, options)
    buffers = Buffers(tile.scores, wide, query.device)
    for first_head in range(0, kv_heads, tile.heads):
        kv_head = slice(first_head, min(first_head + tile.heads, kv_heads))
        count = kv_head.stop - kv_head.start
        head = slice(kv_head.start * group, kv_head.stop * group)
        k, v = matrix(key[row, kv_head], wide), matrix(value[row, kv_head], wide)  # [HEADS, S, D]
        sink = None if sinks is None else sinks[head].to(wide)[:, None, None]  # [HEADS * G, 1, 1]
        for block in blocks(queries, keys, options, *key_range, tile.queries):
            rows = slice(block.start, block.stop)
            length = block.stop - block.start
            if block.keys == 0:
                out[row, head, rows] = 0
                lse[row, head, rows] = math.inf if sink is None else sink[..., 0]
                continue
            q = matrix(query[row, head, rows].reshape(count, group * length, size), wide)
            seen = slice(block.first, block.end)
            scores = scores_of(q, k[:, seen], options, buffers.get("s", count, group * length, block.keys))
            scores = scores.view(count * group, length, block.keys)
            if block.partial:
                hide(scores, block, options)
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
    keys = key.shape[2]
    plain = query.device.type == "cpu" and runs_torchs_kernel(query, key, options, sinks is None)
    causal = options.causal and queries > 1
    if plain:
        query, key, value = _for_torch(query), _for_torch(key), _for_torch(value)
    if plain and key_range is None and keys > 0:
        return _fused_forward(query, key, value, options, causal)
    # The layout torch's own CPU kernel returns: the next op reshapes [B, T, H, D] without a copy.
    out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=wide_dtype(query.dtype))
    for row, (first, end) in enumerate(ranges_of(key_range, batch, keys)):
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
        else:
            _by_blocks(out, lse, query, key, value, sinks, row, (first, end), options)
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
    (heads, queries, size), (kv_heads, keys), wide = query.shape[1:], key.shape[1:3], wide_dtype(query.dtype)
    tile = tile_of(queries, keys, kv_heads, heads // kv_heads, options)
    copies = sum(keys for x in (key, value) if x.dtype != wide or not is_matrix(x))
    return tile.heads * (tile.rows * tile.keys + (copies + 3 * tile.rows) * size) * wide.itemsize


def runs_torchs_kernel(query: torch.Tensor, key: torch.Tensor, options: Options, plain: bool) -> bool:
    """Whether :func:`attention_forward` is torch's own kernel on a CPU; ``plain`` tells that there are no sinks."""
    queries, keys = query.shape[2], key.shape[2]
    return (
        plain
        and options.window is None
        and options.softcap is None
        and queries > 0
        # It hides keys by a score of -inf and multiplies by the scale, in the type of the scores, afterwards.
        and options.scale >= torch.finfo(wide_dtype(query.dtype)).tiny
        # torch's causal mask starts at the top left; the two agree on squares, and on one query without a mask.
        and (not options.causal or queries in (1, keys))
    )
