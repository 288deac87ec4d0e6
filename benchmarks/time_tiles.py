"""Time the attention kernels on this GPU with other tiles than the table's: ``python -m benchmarks.time_tiles``.

Needs a GPU. Each kind of work is timed with the candidate tiles of :mod:`benchmarks.search_tiles` in its place, those
most like the table's first, and all other work with the table's. Compiling takes most of the time, so that it is done
first, by many processes, into triton's cache; then one process times what was compiled. A tile that does not compile or
does not fit is a row that says so. What the rows of gim_kernels/triton/tiles.py say of their evidence comes from here.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import gim_kernels
from benchmarks.cases import AttentionCase, Part, Rule
from benchmarks.measure import DTYPES, Stopwatch, environment, interleaved
from benchmarks.results import SCHEMA, save
from gim_kernels.budget import relative_error
from gim_kernels.triton import tiles
from gim_kernels.triton.tiles import Tile, Work

#: For each kind of work, the rule and the pass that run it.
WORKS: dict[Work, tuple[Rule, Part]] = {
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


def case_of(work: Work, head_size: int, dtype: str, tokens: int) -> AttentionCase:
    """The case that runs a kind of work: 32 query and 8 key heads, causal."""
    rule, part = WORKS[work]
    return AttentionCase(rule, head_size, tokens, 32, 8, True, dtype, part)


@dataclass(frozen=True)
class Job:
    """A tile for a kind of work; ``is_own`` tells the table's."""

    work: Work
    head_size: int
    dtype: str
    tile: Tile
    is_own: bool = False

    def to_dict(self) -> dict[str, Any]:
        """What a row says of it."""
        one = self.tile
        return {
            "work": self.work,
            "head_size": self.head_size,
            "dtype": self.dtype,
            "tile": [one.block_t, one.block_s, one.num_warps, one.num_stages],
            "split": one.split,
            "is_own": self.is_own,
        }


def jobs(architecture: str, head_sizes: Iterable[int], dtype: str) -> list[Job]:
    """All jobs, for every kind of work the table's tile, then in turn the next nearest of each.

    A kind of work that the table splits has no tile of its own to replace, and is left out.
    """
    from benchmarks.search_tiles import candidates

    columns: list[list[Job]] = []
    for size in head_sizes:
        for work in WORKS:
            own = tiles.attention_tile(work, architecture, size, DTYPES[dtype])
            if own.split:
                continue
            others = [one for one in candidates(DTYPES[dtype]) if numbers(one) != numbers(own)]
            columns.append(
                [Job(work, size, dtype, own, True), *(Job(work, size, dtype, one) for one in near(own, others))]
            )
    return [job for row in itertools.zip_longest(*columns) for job in row if job is not None]


def numbers(tile: Tile) -> tuple[int, int, int, int]:
    """What tells one tile from another."""
    return tile.block_t, tile.block_s, tile.num_warps, tile.num_stages


def compile_job(job: Job) -> str | None:
    """Run a job once at a short length, which leaves its kernels in triton's cache; what went wrong, or None."""
    try:
        # As divisible by 16 as the timed length: triton compiles the same code for both.
        case = case_of(job.work, job.head_size, job.dtype, 512)
        with replaced(job.work, job.tile):
            _call(case, case.inputs(torch.device("cuda")))()
            torch.cuda.synchronize()
    except Exception as failure:  # the compiler's exceptions share no base class
        first = next((line for line in str(failure).splitlines() if line.strip()), "")
        return f"{type(failure).__name__}: {first.strip()}"[:200]
    return None


def compile_all(todo: list[Job], processes: int, seconds: float) -> dict[Job, str | None]:
    """Compile in many processes; those that were done in time, with what went wrong."""
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    futures = {job: pool.submit(compile_job, job) for job in todo}
    wait(futures.values(), timeout=seconds)
    for future in futures.values():
        future.cancel()
    # What runs still must end before anything is timed.
    pool.shutdown(wait=True, cancel_futures=True)
    return {
        job: future.result() if future.exception() is None else f"its process ended: {future.exception()}"
        for job, future in futures.items()
        if future.done() and not future.cancelled()
    }


def time_job(job: Job, tokens: int, device: torch.device) -> dict[str, Any]:
    """A row: times of the pass that the work belongs to, and how far its results are from the table's own tile."""
    case = case_of(job.work, job.head_size, job.dtype, tokens)
    run = _call(case, case.inputs(device))
    truth = run()
    with replaced(job.work, job.tile):
        error = max(relative_error(a, b) for a, b in zip(run(), truth, strict=True))
        times = interleaved({"tile": run}, Stopwatch(device), repeats=8, least=4, seconds=0.5)["tile"]
    return {**job.to_dict(), "case": case.name, **times.to_dict(), "difference": float(f"{error:.2e}")}


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the rows, as they come.")],
    head_size: Annotated[str, typer.Option(help="Head sizes.")] = "128,64",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Length.")] = 8192,
    budget: Annotated[float, typer.Option(help="Seconds in all, more than half of them to compile.")] = 120.0,
) -> None:
    """Time candidate tiles of every kind of work, the table's own first."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("error: tiles are timed on a GPU, and torch finds none here")
        raise typer.Exit(2)
    begin, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    found: dict[str, Any] = {"schema": SCHEMA, "suite": "tiles", **environment(device), "complete": False, "rows": []}
    todo = jobs(tiles.architecture_of(torch.empty(0, device=device)), [int(one) for one in head_size.split(",")], dtype)
    processes = max(1, min(12, (os.cpu_count() or 2) - 2))
    compiled = compile_all(todo, processes, 0.55 * budget)
    found["not_reached"] = len(todo) - len(compiled)
    for job, problem in compiled.items():
        if time.monotonic() - begin > budget:
            found["not_reached"] += 1
            continue
        try:
            row = {**job.to_dict(), "note": problem} if problem else time_job(job, tokens, device)
        except Exception as failure:  # one tile that fails must not cost the others
            row = {**job.to_dict(), "note": f"{type(failure).__name__}: {failure}"[:200]}
        found["rows"].append(row)
        save(json_file, found)
        console.print(json.dumps(row), soft_wrap=True, highlight=False)
    found["complete"] = found["not_reached"] == 0
    save(json_file, found)


if __name__ == "__main__":
    typer.run(main)
