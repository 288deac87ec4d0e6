"""In which order the programs of attention start, and how many of them share the query heads of a key head.

A multiprocessor takes the next program when it is done with one, so the last to start decide when all are done: with a
causal mask, where tiles differ in length, the longest of all heads start first. Heads whose data lie in the cache
together form a section, and sections follow one another. All of it is a function of the shape alone.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

import triton
import triton.language as tl

#: Of an H100, whatever the device at hand, so that the order of every sum depends on the shape alone.
MULTIPROCESSORS = 132
#: Bytes that the heads of a section read again and again: half of an H100's cache, for other data pass through it too.
CACHE = 25 * 2**20
#: What a program costs besides its tiles, and what a fold costs besides the programs before it, both in tiles.
START = 4
FOLD = 8
#: Programs for each multiprocessor from which on it does not matter which is the last.
ENOUGH = 4
#: How near to a perfect balance is near enough.
BALANCED = 1.05


@triton.jit
def tile_of_program(program, tiles, columns, section):
    """The tile and the column that a program works on.

    Args:
        program: its number, below ``tiles * columns``.
        tiles: of a column, the longest first.
        columns: heads of the batch, or parts of them.
        section: how many columns run side by side: all their first tiles, then all their second ones.
    """
    begun = program // (tiles * section) * section
    width = tl.minimum(section, columns - begun)
    within = program - begun * tiles
    return within // width, begun + within % width


def section_of(tiles: int, columns: int, shared: int, shared_bytes: int, causal: bool) -> int:
    """How many columns run side by side, the ``section`` of :func:`tile_of_program`; sections are about equal.

    Args:
        tiles: of a column.
        columns: heads of the batch, or parts of them.
        shared: how many columns next to each other read the same data; it divides ``columns``.
        shared_bytes: of those data.
        causal: whether tiles differ in length. Else one column follows another.
    """
    if not causal:
        return 1
    sharing = columns // shared
    # With fewer programs a section's last ones would run beside the next one's first: the short before the long.
    least = triton.cdiv(ENOUGH * MULTIPROCESSORS, tiles * shared)
    most = max(1, CACHE // max(1, shared_bytes))
    sections = max(1, min(triton.cdiv(sharing, most), sharing // least))
    return triton.cdiv(sharing, sections) * shared


def makespan(costs: Sequence[int], columns: int, section: int) -> int:
    """When the last of all programs is done, each starting on the first multiprocessor that is free.

    Args:
        costs: of a column's tiles, in the order of :func:`tile_of_program`.
        columns, section: as there.
    """
    free = [0] * MULTIPROCESSORS
    for begun in range(0, columns, section):
        for cost in costs:
            for _ in range(min(section, columns - begun)):
                heapq.heapreplace(free, free[0] + cost)
    return max(free)


def query_tiles(queries: int, keys: int, window: int | None, causal: bool, block_t: int, block_s: int) -> list[int]:
    """How many query tiles each key tile meets, as :func:`gim_kernels.triton.primitives.visible_queries` has it."""
    found = []
    for start in range(0, keys, block_s):
        top, bottom = start - (keys - queries), min(start + block_s, keys) - 1 - (keys - queries)
        low = max(0, top) if causal else 0
        high = queries if window is None else min(queries, bottom + window)
        found.append(triton.cdiv(max(high, low), block_t) - low // block_t)
    return found


@functools.lru_cache(4096)
def members_of(
    queries: int, keys: int, window: int | None, causal: bool, block_t: int, block_s: int, key_heads: int, group: int
) -> int:
    """How many of the query heads that share a key head one program sums over: all, or an equal part of them.

    A part where few programs would leave multiprocessors idle for long: the largest that comes near a perfect balance,
    or else the one that is done first. There are parts to be folded only below a number of programs that does not
    depend on the length of the sequence.

    Args:
        queries, keys, window, causal: of the attention.
        block_t, block_s: of the tile.
        key_heads: of all rows of the batch.
        group: query heads of a key head.
    """
    if group == 1 or triton.cdiv(keys, block_s) * key_heads >= ENOUGH * MULTIPROCESSORS:
        return group
    met = query_tiles(queries, keys, window, causal, block_t, block_s)
    balance = key_heads * sum(group * tiles + START for tiles in met) / MULTIPROCESSORS
    best = group
    soonest = float("inf")
    for members in (n for n in range(group, 0, -1) if group % n == 0):
        columns = key_heads * group // members
        done = makespan([members * tiles + START for tiles in met], columns, columns if causal else 1)
        if done <= BALANCED * balance:
            return members
        done += FOLD * (members < group)
        if done < soonest:
            best, soonest = members, done
    return best
