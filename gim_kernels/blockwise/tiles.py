"""How scores are cut: which queries and keys a block holds, how much of it at once, and in what memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

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


def hide(scores: torch.Tensor, block: Block, options: Options) -> None:
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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
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


def ranges_of(key_range: torch.Tensor | None, batch: int, keys: int) -> list[tuple[int, int]]:
    """First and one-past-last key of each row of the batch, as integers within ``0..keys``."""
    if key_range is None:
        return [(0, keys)] * batch
    return [(max(0, int(first)), min(keys, int(end))) for first, end in key_range.tolist()]


def is_matrix(x: torch.Tensor) -> bool:
    """Whether the last two dimensions of ``x`` ``[.., N, D]`` lie in memory as BLAS takes them, by rows or by columns.

    What does not, it would copy at every product.
    """
    (rows, columns), (row, column) = x.shape[-2:], x.stride()[-2:]
    return (column == 1 and (row >= columns or rows == 1)) or (row == 1 and (column >= rows or columns == 1))


def matrix(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """``x`` in wide numbers and as :func:`is_matrix` wants it: itself where it is so already, else one copy."""
    if is_matrix(x):
        return x.to(wide)
    return x.to(wide, memory_format=torch.contiguous_format).contiguous()


class Buffers:
    """Score buffers reused by every block, so that a pass allocates each once."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
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


def scores_of(query: torch.Tensor, key: torch.Tensor, options: Options, into: torch.Tensor) -> torch.Tensor:
    """``softcap(scale * query @ key.T)``, written into ``into`` ``[HEADS, ROWS, KEYS]``."""
    torch.bmm(query, key.mT, out=into)
    if options.softcap is None:
        return into.mul_(options.scale)
    return into.mul_(options.scale / options.softcap).tanh_().mul_(options.softcap)
