"""Attention's rules made of torch's exact attention, whichever that is: an independent check of ours, and its rival.

With a slash for "detached"::

    exact         sdpa(q, k, v)
    constant      sdpa(q/, k/, v)
    temperature   sdpa(q/, k/, v, scale) + T * (Y - Y/),   Y = sdpa(q, k, v/, scale / T)

The value is the first call's, bit for bit; the T takes away the 1 / T that ``scale / T`` brings into the second's
gradient. What torch's own mask does not say is cut into calls: padding row by row; a window, or a causal mask aligned
bottom-right over more keys than queries, by blocks of queries with a mask of BLOCK x S each.

The backward runs the exact attention again, since torch's function keeps its log-sum-exp to itself: 2 matrix products
forward and 14 backward under a temperature, where an engine of ours needs 2 and 5 to 8. It runs where it is asked for.
Where ``scale / T`` or the factor T would cost digits, the second call is in the next wider type (:func:`_type`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from gim_kernels.inner_autograd import gradients, leaf, recording
from gim_kernels.told import tell
from gim_kernels.types import Gradient, Options

#: Queries that share one mask of BLOCK x S.
BLOCK = 128
#: A float16 that is multiplied by more than this may be too large for one.
LARGEST_FACTOR_OF_FLOAT16 = 16.0


@dataclass(frozen=True)
class Piece:
    """Queries ``start:stop`` that see a key, and the keys ``first:end`` that any of them sees: one call.

    ``mask`` says which of them each sees: None for all, ``"causal"`` for a square with torch's own causal mask, or
    ``"band"`` for a mask of its own.
    """

    start: int
    stop: int
    first: int
    end: int
    mask: str | None = None


def pieces(queries: int, keys: int, options: Options, first: int, end: int) -> Iterator[Piece]:
    """The calls that one row of the batch takes, over its keys ``first:end``; queries that see no key are in none."""
    offset, causal, window = keys - queries, options.causal, options.window
    if window is not None and window >= keys - first:
        window = None  # it hides nothing
    start, stop = 0, queries
    if causal:
        start = max(start, first - offset)
    if window is not None:
        stop = min(stop, end - 1 + window - offset)
    if first >= end:
        return
    if window is None:
        # From here on a query stands behind the last key, or sees all keys wherever it stands.
        whole = max(start, min(stop, end - offset - 1)) if causal else start
        if causal and start + offset == first and whole > start:
            square = min(stop, end - offset)
            yield Piece(start, square, first, square + offset, "causal")
            start = whole = square
        yield from _blocks(start, min(whole, stop), offset, options, first, end)
        if whole < stop:
            yield Piece(whole, stop, first, end)
        return
    yield from _blocks(start, stop, offset, options, first, end)


def _blocks(start: int, stop: int, offset: int, options: Options, first: int, end: int) -> Iterator[Piece]:
    for block in range(start, stop, BLOCK):
        last = min(block + BLOCK, stop)
        low = first if options.window is None else max(first, block + offset - options.window + 1)
        high = min(end, last + offset) if options.causal else end
        yield Piece(block, last, low, high, "band")


def _band(piece: Piece, offset: int, options: Options, device: torch.device) -> torch.Tensor:
    """Booleans ``[QUERIES, KEYS]`` of a piece, True where a query sees a key; no row is without one."""
    position = torch.arange(piece.start, piece.stop, device=device)[:, None] + offset
    key = torch.arange(piece.first, piece.end, device=device)
    seen = torch.ones(len(position), len(key), dtype=torch.bool, device=device)
    if options.causal:
        seen &= key <= position
    if options.window is not None:
        seen &= key > position - options.window
    return seen


def _rows(
    batch: int, queries: int, keys: int, key_range: torch.Tensor | None, options: Options
) -> Iterator[tuple[slice, Piece]]:
    """Every call: rows of the batch and the piece; all rows at once where none is padded."""
    if key_range is None:
        rows = [(slice(None), 0, keys)]
    else:
        ranges = [(max(0, int(first)), min(keys, int(end))) for first, end in key_range.tolist()]
        rows = [(slice(row, row + 1), first, end) for row, (first, end) in enumerate(ranges)]
    if batch == 0:
        return
    for row, first, end in rows:
        for piece in pieces(queries, keys, options, first, end):
            yield row, piece


def _walkable(x: torch.Tensor) -> torch.Tensor:
    """``x`` where torch's fused kernels take its strides, else a contiguous copy: they step by 1 within a row, and
    would hand a gradient of rows that overlap to a kernel that writes them."""
    *outer, last = x.stride()
    width = x.shape[-1]
    fits = last == 1 and all(step >= width or count == 1 for step, count in zip(outer, x.shape, strict=False))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, str]:
    """torch's exact attention, and the name of its backend.

    Raises:
        NotImplementedError: torch would use whole score matrices.
    """
    if scale < torch.finfo(torch.promote_types(query.dtype, torch.float32)).tiny:
        # torch hides a key by a score of -inf and multiplies afterwards: 0 would give NaN, a negative number +inf.
        query, scale = (-query, -scale) if scale < 0 else (query * 0.0, 1.0)
        return _exact(query, key, value, mask, causal, scale)
    grouped = query.shape[1] != key.shape[1]
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped))
    if chosen is SDPBackend.MATH and grouped:
        # Not every backend has grouped heads; their gradients are summed over the group by autograd.
        group = query.shape[1] // key.shape[1]
        return _exact(query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, causal, scale)
    if chosen in (SDPBackend.MATH, SDPBackend.ERROR):
        raise NotImplementedError(
            f'engine="composed": torch has no exact attention in O(T) memory for {query.dtype} with a head size of '
            f"{query.shape[-1]}{'' if mask is None else ' and a mask'} on {query.device.type} (its backend would be "
            f'{chosen.name}): choose another engine, such as "auto"'
        )
    out = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    return out, chosen.name


def _type(dtype: torch.dtype, temperature: float) -> torch.dtype:
    """What the call through the scores runs in.

    Below 1, scores are larger by 1 / T, and so is what torch's attention rounds off them; the gradient is multiplied by
    T, which takes a float16 to where it has few digits or, above 1, to infinity.
    """
    if temperature >= 1.0 and (dtype != torch.float16 or temperature <= LARGEST_FACTOR_OF_FLOAT16):
        return dtype
    return torch.float64 if dtype == torch.float32 else torch.promote_types(dtype, torch.float32)


def _check(sinks: torch.Tensor | None, options: Options) -> None:
    """Refuse what torch's exact attention does not have."""
    for name, given in (("softcap", options.softcap), ("sinks", sinks)):
        if given is not None:
            raise NotImplementedError(
                f'engine="composed" has no {name}, since torch\'s exact attention has none: choose another engine, '
                'such as "auto"'
            )


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's exact attention; no use for the log-sum-exp.

    Raises:
        NotImplementedError: with a softcap or sinks, and where torch would use whole score matrices.
    """
    _check(sinks, options)
    batch, heads, queries, size = query.shape
    query, key, value = _walkable(query), _walkable(key), _walkable(value)
    out = query.new_zeros(batch, queries, heads, size).transpose(1, 2)
    for row, piece in _rows(batch, queries, key.shape[2], key_range, options):
        q, k, v, mask = _cut(query, key, value, row, piece, options)
        part, backend = _exact(q, k, v, mask, piece.mask == "causal", options.scale)
        tell(f"composed ({backend})")
        out[row, :, piece.start : piece.stop] = part
    return out, query.new_zeros(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


def _cut(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: slice, piece: Piece, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a piece is called with."""
    q = query[row, :, piece.start : piece.stop]
    k, v = (x[row, :, piece.first : piece.end] for x in (key, value))
    mask = _band(piece, key.shape[2] - query.shape[2], options, query.device) if piece.mask == "band" else None
    return q, k, v, mask


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
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """Gradients through one call of the exact attention, or two under a temperature other than 1.

    The gradients of key and value are summed over blocks of queries, and multiplied by their factors, in float32
    (float64 for float64), and rounded once more at the end.
    """
    temperature = temperature if softmax_backward == "temperature" else 1.0
    through_scores = softmax_backward != "constant"
    wide = torch.promote_types(query.dtype, torch.float32)
    inputs = (query, key, value)
    query, key, value = (_walkable(x) for x in inputs)
    sums = [torch.zeros_like(x, dtype=wide) if need else None for x, need in zip(inputs, needs, strict=False)]
    scores, values = (needs[0] and through_scores, needs[1] and through_scores), needs[2]
    for row, piece in _rows(query.shape[0], query.shape[2], key.shape[2], key_range, options):
        q, k, v, mask = _cut(query, key, value, row, piece, options)
        places = [(row, slice(None), slice(a, b)) for a, b in ((piece.start, piece.stop), (piece.first, piece.end))]
        grad = _walkable(grad_out[row, :, piece.start : piece.stop])
        together = temperature == 1.0
        for asked, dtype, factor in (
            ((*(scores if together else (False, False)), values), query.dtype, 1.0),
            ((*(scores if not together else (False, False)), False), _type(query.dtype, temperature), temperature),
        ):
            if not any(asked):
                continue
            leaves = [leaf(x.to(dtype), need) for x, need in zip((q, k, v), asked, strict=True)]
            with recording():
                again, _ = _exact(leaves[0], leaves[1], leaves[2], mask, piece.mask == "causal", options.scale / factor)
            found = gradients(again, grad.to(dtype) * factor if factor != 1.0 else grad, leaves)
            for total, part, place in zip(sums, found, (places[0], places[1], places[1]), strict=True):
                if total is not None and part is not None:
                    total[place] += part
    given = [
        None if total is None else total.mul_(factor).to(x.dtype)
        for total, factor, x in zip(sums, grad_scale, inputs, strict=True)
    ]
    return given[0], given[1], given[2], None


def _largest_call(query: torch.Tensor, key: torch.Tensor, options: Options) -> tuple[int, int, int]:
    """Numbers of queries and of keys in the largest call, and bytes of its mask."""
    queries, keys = query.shape[2], key.shape[2]
    size = query.shape[0] * query.shape[3]
    found = [(one.stop - one.start, one.end - one.first, one.mask) for one in pieces(queries, keys, options, 0, keys)]
    rows, columns, mask = max(found, key=lambda one: one[0] + one[1], default=(0, 0, None))
    # torch adds a mask of numbers in the scores' place.
    masked = rows * columns * (1 + query.itemsize) if mask == "band" else 0
    return size * query.shape[1] * rows, size * key.shape[1] * columns, masked


def _copied(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.itemsize for x in tensors if _walkable(x) is not x)


def forward_workspace(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> int:
    """Bytes that :func:`attention_forward` holds besides its arguments and results, but for what torch's kernels do:
    copies of what torch cannot walk, one call's output and mask.

    Args:
        query: ``[B, HQ, T, D]``; only shape, strides and dtype count, as of ``key`` and ``value`` ``[B, HK, S, D]``.
        options: scale and mask.
    """
    numbers, _, mask = _largest_call(query, key, options)
    return _copied(query, key, value) + numbers * query.itemsize + mask


def backward_workspace(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Options,
    softmax_backward: str,
    temperature: float,
) -> int:
    """The same of :func:`attention_backward`: besides, sums in float32, and what one call and its gradients are, at
    most four times as large as its queries and three times as its keys (measured), and three times either where the
    second is in a wider type."""
    of_queries, of_keys, mask = _largest_call(query, key, options)
    wide = torch.promote_types(query.dtype, torch.float32).itemsize
    sums = 0 if wide == query.itemsize else wide * (query.numel() + key.numel() + value.numel())
    call = (4 * of_queries + 3 * of_keys) * query.itemsize
    dtype = _type(query.dtype, temperature) if softmax_backward == "temperature" else query.dtype
    if dtype != query.dtype:
        call += (3 * of_queries + 3 * of_keys) * dtype.itemsize
    return _copied(query, key, value) + sums + call + mask
