"""Time the attention kernels on this GPU with other tiles than the table's: ``python -m benchmarks.time_tiles``.

Needs a GPU. Each kind of work is timed with every candidate tile of :mod:`benchmarks.search_tiles` in its place, all
others from the table; a tile that does not compile, or spills so that it does not fit, is a row that says so. What the
rows of gim_kernels/triton/tiles.py say of their evidence comes from here. Rows are written as they come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import gim_kernels
from benchmarks.cases import AttentionCase, Rule
from benchmarks.measure import DTYPES, Stopwatch, environment, interleaved
from benchmarks.results import SCHEMA, save
from gim_kernels.triton import tiles
from gim_kernels.triton.tiles import Tile, Work
from tests.oracle import relative_error

#: For each kind of work, the rule and the pass that run it.
WORKS: dict[Work, tuple[Rule, str]] = {
    "grad_query": ("temperature", "step"),
    "grad_key_value": ("temperature", "step"),
    "forward": ("exact", "forward"),
    "grad_query_exact": ("exact", "step"),
    "grad_value": ("constant", "step"),
}


@contextmanager
def replaced(work: Work, tile: Tile) -> Iterator[None]:
    """Inside, the launchers of this process take ``tile`` for ``work``."""
    before = tiles.attention_tile

    def chosen(asked: Work, *arguments: Any, **named: Any) -> Tile:
        return tile if asked == work else before(asked, *arguments, **named)

    setattr(tiles, "attention_tile", chosen)  # noqa: B010 - a function in place of one with other arguments
    try:
        yield
    finally:
        tiles.attention_tile = before


def near(tile: Tile, candidates: list[Tile]) -> list[Tile]:
    """The candidates, those most like ``tile`` first: what a short run should try."""

    def distance(other: Tile) -> float:
        def steps(a: int, b: int) -> int:
            return abs(a.bit_length() - b.bit_length())

        return (
            steps(other.block_t, tile.block_t)
            + steps(other.block_s, tile.block_s)
            + steps(other.num_warps, tile.num_warps)
            + abs(other.num_stages - tile.num_stages)
        )

    return sorted(candidates, key=distance)


def _call(case: AttentionCase, inputs: tuple[torch.Tensor, ...]) -> Any:
    query, key, value, grad = inputs
    if case.part == "forward":
        return lambda: (gim_kernels.attention(query, key, value, causal=case.causal),)
    leaves = tuple(x.detach().requires_grad_(True) for x in (query, key, value))

    def step() -> tuple[torch.Tensor, ...]:
        out = gim_kernels.attention(*leaves, causal=case.causal, softmax_backward=case.rule)
        return tuple(g for g in torch.autograd.grad(out, leaves, grad, allow_unused=True) if g is not None)

    return step


def time_work(
    work: Work, head_size: int, dtype: str, device: torch.device, tokens: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """A row for the table's tile, then one for each candidate, until the clock reads ``deadline``."""
    from benchmarks.search_tiles import candidates

    rule, part = WORKS[work]
    case = AttentionCase(rule, head_size, tokens, 32, 8, True, dtype, "forward" if part == "forward" else "step")
    inputs = case.inputs(device)
    watch = Stopwatch(device)
    run = _call(case, inputs)
    own = tiles.attention_tile(work, tiles.architecture_of(inputs[0]), head_size, DTYPES[dtype])
    base = {"work": work, "case": case.name, "head_size": head_size, "dtype": dtype}
    truth = run()
    seen: set[tuple[int, int, int, int, bool]] = set()
    others = [] if own.split else near(own, list(candidates(DTYPES[dtype])))
    for tile in [own, *others]:
        key = (tile.block_t, tile.block_s, tile.num_warps, tile.num_stages, tile.split)
        if key in seen:
            continue
        seen.add(key)
        if time.monotonic() > deadline:
            yield {**base, "note": f"stopped for want of time before {len(others) + 1 - len(seen)} more tiles"}
            return
        row = {**base, "tile": list(key[:4]), "split": tile.split, "is_own": tile is own}
        try:
            with replaced(work, tile):
                found = run()
                error = max(relative_error(a, b) for a, b in zip(found, truth, strict=True))
                times = interleaved({"tile": run}, watch, repeats=8, least=4, seconds=1.0)["tile"]
        except Exception as failure:  # the compiler's exceptions share no base class
            first = next((line for line in str(failure).splitlines() if line.strip()), "")
            yield {**row, "note": f"{type(failure).__name__}: {first}"[:200]}
            continue
        yield {**row, **times.to_dict(), "difference": float(f"{error:.2e}")}


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the rows, as they come.")],
    head_size: Annotated[list[int], typer.Option(help="Head sizes.")] = [128, 64],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Length.")] = 8192,
    budget: Annotated[float, typer.Option(help="Seconds in all.")] = 120.0,
) -> None:
    """Time every candidate tile of every kind of work, the table's own first."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("error: tiles are timed on a GPU, and torch finds none here")
        raise typer.Exit(2)
    device = torch.device("cuda")
    found: dict[str, Any] = {"schema": SCHEMA, "suite": "tiles", **environment(device), "complete": False, "rows": []}
    begin, jobs = time.monotonic(), [(size, work) for size in head_size for work in WORKS]
    for index, (size, work) in enumerate(jobs):
        # What is left is shared out evenly, so that every kind of work gets its turn.
        deadline = time.monotonic() + (begin + budget - time.monotonic()) / (len(jobs) - index)
        try:
            for row in time_work(work, size, dtype, device, tokens, deadline):
                found["rows"].append(row)
                save(json_file, found)
                console.print(json.dumps(row), soft_wrap=True, highlight=False)
        except Exception as failure:  # one kind of work that fails must not cost the others
            note = f"{type(failure).__name__}: {failure}"[:300]
            found["rows"].append({"work": work, "head_size": size, "note": note})
            save(json_file, found)
            console.print(note, soft_wrap=True)
    found["complete"] = True
    save(json_file, found)


if __name__ == "__main__":
    typer.run(main)
