"""In which order the programs of attention start: every tile once, the longest first, and nobody idle for long."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

from gim_kernels.triton import order, tiles
from gim_kernels.triton.tiles import Work
from tests.first import first

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Multiprocessors of an H100, and what a program costs there besides its tiles, in tiles.
H100, START = 132, 4
#: Query heads, key heads and head sizes of models, and by how much the last program may outlast a perfect balance.
MODELS = {
    "32/8": (32, 8, 128, 1.05),
    "32/8 narrow": (32, 8, 64, 1.05),
    "32/32": (32, 32, 128, 1.05),
    "12/2": (12, 2, 128, 1.25),
    "8/4 wide": (8, 4, 256, 1.10),
}


@triton.jit
def order_kernel(
    tile_ptr: Any, column_ptr: Any, programs: Any, count: Any, columns: Any, section: Any, block: tl.constexpr
) -> None:
    """Where each program of a launch works."""
    program = tl.minimum(tl.arange(0, block), programs - 1)
    tile, column = order.tile_of_program(program, count, columns, section)
    tl.store(tile_ptr + program, tile)
    tl.store(column_ptr + program, column)


def started(count: int, columns: int, section: int) -> list[tuple[int, int]]:
    """Tile and column of every program, in the order in which they start."""
    programs = count * columns
    tile, column = (torch.full((programs,), -1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    order_kernel[(1,)](tile, column, programs, count, columns, section, block=triton.next_power_of_2(programs))
    return list(zip(tile.tolist(), column.tolist(), strict=True))


def last_done(costs: list[float]) -> float:
    """When the last program is done, if each starts on the multiprocessor that is free first."""
    free = [0.0] * H100
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def seen(rows: int, others: int, block: int, block_other: int, of_keys: bool) -> list[int]:
    """For each block of queries, or of keys, how many blocks of the others it meets under a causal mask."""
    found = []
    for start in range(0, rows, block):
        end = min(start + block, rows)
        first, last = (start, others) if of_keys else (0, end)
        found.append(math.ceil(last / block_other) - first // block_other)
    return found


def imbalance(work: Work, heads: int, key_heads: int, size: int, length: int, described: bool) -> float:
    """When a kernel of sm_90 is done, over when it would be if its work could be shared out evenly."""
    tile = tiles.attention_tile(work, "cuda:90", size, torch.bfloat16, described=described)
    group = heads // key_heads
    of_queries = work.startswith(("forward", "grad_query"))
    if of_queries:
        columns, members = heads, 1
        met = seen(length, length, tile.block_t, tile.block_s, False)[::-1]
        section = order.section_of(len(met), columns, group, 4 * length * size, True)
    else:
        met = seen(length, length, tile.block_s, tile.block_t, True)
        members = order.members_of(length, length, None, True, tile.block_t, tile.block_s, key_heads, group)
        columns = heads // members
        section = order.section_of(len(met), columns, 1, members * 4 * length * size, True)
    costs: list[float] = [members * met[tile] + START for tile, _ in started(len(met), columns, section)]
    each = [n + START for n in met] if of_queries else [group * n + START for n in met]
    return last_done(costs) / ((heads if of_queries else key_heads) * sum(each) / H100)


@pytest.mark.parametrize("length", first((4096, 6144, 8192, 16384, 32768), (4096, 6144)))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("described", [True, False], ids=["descriptors", "pointers"])
def test_no_multiprocessor_is_idle_for_long(described: bool, model: str, length: int) -> None:
    heads, key_heads, size, most = MODELS[model]
    if model == "8/4 wide" and length == 6144:
        most = 1.15  # 48 tiles of 8 heads are 2.9 for each multiprocessor: two or three
    together = () if size == 256 else ("grad_key_value",)
    works: tuple[Any, ...] = ("forward", "grad_query", *together, "grad_key", "grad_value")
    for work in works:
        found = imbalance(work, heads, key_heads, size, length, described)
        assert 1.0 <= found <= most, f"{work}: {found:.3f}"
    if model == "12/2" and length > 4096:
        assert max(imbalance(work, heads, key_heads, size, length, described) for work in works) <= 1.12


def test_what_would_go_without_it() -> None:
    """One head after another, and one program for each key head: what the order and the parts are for."""
    met = seen(4096, 4096, 128, 32, True)
    alone = [6 * n + START for _ in range(2) for n in met]
    assert last_done(alone) / (sum(alone) / H100) > 3.9
    eight = [4 * n + START for _ in range(8) for n in met]
    assert last_done(eight) / (sum(eight) / H100) > 1.5


@given(count=st.integers(1, 40), columns=st.integers(1, 24), section=st.integers(1, 30))
@settings(max_examples=60)
def test_every_tile_of_every_column_starts_once(count: int, columns: int, section: int) -> None:
    section = min(section, columns)
    found = started(count, columns, section)
    want = [
        (tile, column)
        for first in range(0, columns, section)
        for tile in range(count)
        for column in range(first, min(first + section, columns))
    ]
    assert found == want


def test_a_section_fits_the_cache_unless_too_few_programs_would_run() -> None:
    for count, columns, group, each in itertools.product((1, 8, 100, 1000), (1, 7, 64), (1, 4), (10, 10**6, 10**9)):
        section = order.section_of(count, columns * group, group, each, True)
        assert section % group == 0 and 1 <= section <= columns * group
        fits = section == group or section // group * each <= order.CACHE
        few = section * count < 2 * (4 * H100 + group * count)
        assert fits or few, (count, columns, group, each, section)
        assert section == columns * group or section * count >= 4 * H100
        assert order.section_of(count, columns * group, group, each, False) == 1


@given(
    queries=st.integers(1, 90), keys=st.integers(1, 90), window=st.none() | st.integers(1, 100), causal=st.booleans(),
    block_t=st.sampled_from([8, 16, 32]), block_s=st.sampled_from([8, 16, 32]),
)  # fmt: skip
@settings(max_examples=150)
def test_tiles_are_counted_as_the_mask_has_them(
    queries: int, keys: int, window: int | None, causal: bool, block_t: int, block_s: int
) -> None:
    position, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        mask &= column <= position
    if window is not None:
        mask &= column > position - window
    found = order.query_tiles(queries, keys, window, causal, block_t, block_s)
    want = [sum(bool(rows.any()) for rows in part.split(block_t)) for part in mask.split(block_s, 1)]
    # A key tile between two windows of a query tile's rows is visited, though no pair of them is seen.
    assert len(found) == len(want) and all(a <= b <= a + 1 for a, b in zip(want, found, strict=True))
    assert causal is False or window is not None or found == want


def test_parts_take_memory_that_does_not_grow_with_the_sequence() -> None:
    most = 4 * H100 * 128
    for length in (100, 1000, 4096, 10**4, 10**5, 10**6):
        for batch_heads, group in ((1, 71), (2, 6), (8, 4), (32, 1), (64, 8)):
            members = order.members_of(length, length, None, True, 32, 128, batch_heads, group)
            assert group % members == 0
            rows = 0 if members == group else batch_heads * group // members * length
            assert rows <= most * group
            assert group > 1 or members == 1


def test_few_long_programs_are_shared_and_many_or_short_ones_are_not() -> None:
    def members(length: int, key_heads: int, group: int, causal: bool = True) -> int:
        return order.members_of(length, length, None, causal, 32, 128, key_heads, group)

    assert members(4096, 2, 6) == 1
    assert members(4096, 2, 6, causal=False) < 6
    assert members(4096, 8, 4) == 4  # as many programs as an even balance wants
    assert members(65536, 2, 6) == 6
    assert members(32, 1, 4) == 4  # done before a fold would start
