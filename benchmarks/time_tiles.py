"""Time the attention kernels alone on this GPU with other tiles than the table's: ``python -m benchmarks.time_tiles``.

For each kernel: the table's own tile, its tile for plain pointers in place of descriptors (TMA), the table's own with
one head after another, and the tiles most like it. Compiling takes most of the time, so that it is done first, by many
processes, into triton's cache; then one process times what was compiled, without the host's share. A tile that does not
compile or does not fit is a row that says so. What the rows of gim_kernels/triton/tiles.py say of their evidence comes
from here.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console

from benchmarks.measure import DTYPES, Stopwatch, environment, interleaved
from benchmarks.results import SCHEMA, save
from gim_kernels.budget import relative_error
from gim_kernels.triton import attention_grad, attention_out, launch, tiles
from gim_kernels.triton.attention_grad_key_value import grad_key_value_variant
from gim_kernels.triton.attention_grad_query import grad_query_variant
from gim_kernels.triton.dispatch import Launch
from gim_kernels.triton.tiles import Tile, Work
from gim_kernels.types import Options

#: The rule under which a kernel is timed.
RULES: dict[Work, str] = {
    "grad_query": "temperature",
    "grad_key_value": "temperature",
    "forward": "exact",
    "grad_query_exact": "exact",
    "grad_value": "constant",
}
#: Heads of query and key: one key head for each query head, and grouped as in Llama 3.
HEADS = ((32, 32), (32, 8))
#: Tiles of a kernel, the table's own and its like among them.
CANDIDATES = 8


def forget() -> None:
    """Forget which tile any layout got."""
    attention_out.forward_plans.clear()
    attention_grad.backward_plans.clear()
    for variant in (attention_out.forward_variant, grad_query_variant, grad_key_value_variant):
        variant.cache_clear()


@dataclass(frozen=True)
class Job:
    """A tile for a kernel, and how it reads and in which order it runs; ``is_own`` tells the table's.

    Args:
        work, head_size, dtype: the kernel.
        tile: its tile.
        described: whether it may read through descriptors.
        by_heads: whether its programs run head after head, in place of the table's order.
        is_own: whether all that is the table's own.
    """

    work: Work
    head_size: int
    dtype: str
    tile: Tile
    described: bool = True
    by_heads: bool = False
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
            "described": self.described,
            "by_heads": self.by_heads,
            "is_own": self.is_own,
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the launchers of this process take it."""
        before = tiles.attention_tile

        def chosen(asked: Work, *arguments: Any, **named: Any) -> Tile:
            return self.tile if asked == self.work else before(asked, *arguments, **named)

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(tiles, "attention_tile", chosen))
            if not self.described:
                patches.enter_context(mock.patch.object(tiles, "DESCRIBED", ()))
            if self.by_heads:
                patches.enter_context(mock.patch.object(launch, "section_of", lambda *_: 1))
            forget()
            try:
                yield
            finally:
                forget()


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


def numbers(tile: Tile) -> tuple[int, int, int, int]:
    """What tells one tile from another."""
    return tile.block_t, tile.block_s, tile.num_warps, tile.num_stages


def jobs(architecture: str, head_sizes: Iterable[int], dtype: str) -> list[Job]:
    """All jobs, for every kernel the table's tile, then in turn the next of each.

    A kernel that the table splits has no tile of its own to replace, and is left out.
    """
    from benchmarks.search_tiles import candidates

    described = architecture in tiles.DESCRIBED and DTYPES[dtype].itemsize == 2
    columns: list[list[Job]] = []
    for size in head_sizes:
        for work in RULES:
            own = tiles.attention_tile(work, architecture, size, DTYPES[dtype], described=described)
            if own.split:
                continue
            column = [Job(work, size, dtype, own, is_own=True)]
            if described:
                pointers = tiles.attention_tile(work, architecture, size, DTYPES[dtype])
                column.append(Job(work, size, dtype, pointers, described=False))
            column.append(Job(work, size, dtype, own, by_heads=True))
            others = [one for one in candidates(DTYPES[dtype]) if numbers(one) != numbers(own)]
            column += [Job(work, size, dtype, one) for one in near(own, others)]
            columns.append(column[:CANDIDATES])
    return [job for row in itertools.zip_longest(*columns) for job in row if job is not None]


def kernel_of(
    job: Job, tokens: int, heads: tuple[int, int], device: torch.device
) -> tuple[Launch, tuple[torch.Tensor | None, ...], list[torch.Tensor]]:
    """The launch of a kernel alone, its tensors, and those that it writes; of a job's tile :meth:`Job.in_place`."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        shape = (1, tokens, count, job.head_size)
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[job.dtype]).transpose(1, 2)

    query, key, value, grad = draw(heads[0]), draw(heads[1]), draw(heads[1]), draw(heads[0])
    options = Options(job.head_size**-0.5, causal=True)
    out, lse = attention_out.attention_forward(query, key, value, None, None, options)
    if job.work == "forward":
        forward = attention_out.forward_plans((query, key, value, None, None), options).launch
        assert forward is not None
        return forward, (query, key, value, None, None, out, lse), [out, lse]
    needs, scales = (True, True, True, False), (1.0, 1.0, 1.0)
    tensors = (grad, query, key, value, None, None, out)
    plan = attention_grad.backward_plans(tensors, options, RULES[job.work], 2.0, scales, needs)
    rows = [torch.empty_like(lse) if i != 1 or plan.norm else None for i in range(3)]
    read = (grad, query, key, value)
    if plan.over_queries is not None:
        into = torch.empty_like(query)
        given = (*read, None, None, out, lse, into, None, *rows)
        plan.over_queries(*given)
        if job.work in ("grad_query", "grad_query_exact"):
            return plan.over_queries, given, [into]
    over, (into_key, into_value) = plan.over_keys[0], (torch.empty_like(key), torch.empty_like(value))
    partial = lse if over.parts is None else torch.empty(over.parts, dtype=torch.float32, device=device)
    places = (into_key if over.grad_key else None, into_value if over.grad_value else None)
    handed = rows if over.grad_key else (lse, None, None)
    written = [one for one in places if one is not None] if over.parts is None else [partial]
    return over.launch, (*read, None, *places, partial, *handed), written


def compile_job(job: Job) -> str | None:
    """Run a job once at a short length, which leaves its kernel in triton's cache; what went wrong, or None."""
    try:
        with job.in_place():
            # As divisible by 16 as the timed length: triton compiles the same code for both.
            run, given, _ = kernel_of(job, 512, HEADS[0], torch.device("cuda"))
            run(*given)
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


def time_job(job: Job, tokens: int, heads: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """A row: times of the kernel, and how far its results are from those of the table's own tile."""
    run, given, truth = kernel_of(job, tokens, heads, device)
    run(*given)
    with job.in_place():
        run, given, written = kernel_of(job, tokens, heads, device)
        run(*given)
        comparable = [(a, b) for a, b in zip(written, truth, strict=True) if a.shape == b.shape]
        error = max((relative_error(a, b) for a, b in comparable), default=float("nan"))
        times = interleaved({"tile": lambda: run(*given)}, Stopwatch(device), repeats=8, least=4, seconds=0.25)["tile"]
    where = {"tokens": tokens, "heads": list(heads), "programs": run.programs}
    return {**job.to_dict(), **where, **times.to_dict(), "difference": float(f"{error:.2e}")}


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the rows, as they come.")],
    head_size: Annotated[str, typer.Option(help="Head sizes.")] = "128,64",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    tokens: Annotated[int, typer.Option(help="Length.")] = 8192,
    budget: Annotated[float, typer.Option(help="Seconds in all, more than half of them to compile.")] = 120.0,
    tiny: Annotated[bool, typer.Option(help="One job: in triton's interpreter on a CPU.")] = False,
) -> None:
    """Time candidate tiles of every kernel, the table's own first."""
    console = Console()
    if not torch.cuda.is_available() and not tiny:
        console.print("error: tiles are timed on a GPU, and torch finds none here")
        raise typer.Exit(2)
    begin = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, Any] = {"schema": SCHEMA, "suite": "tiles", **environment(device), "complete": False, "rows": []}
    if tiny:
        tokens, dtype = 80, "float16"
    architecture = "cuda:90" if tiny else tiles.architecture_of(torch.empty(0, device=device))
    todo = jobs(architecture, [int(one) for one in head_size.split(",")], dtype)
    if tiny:
        compiled: dict[Job, str | None] = dict.fromkeys(todo[:1])
    else:
        compiled = compile_all(todo, max(1, min(12, (os.cpu_count() or 2) - 2)), 0.55 * budget)
    found["not_reached"] = len(todo) - len(compiled)
    for job, problem in compiled.items():
        for heads in ((2, 1),) if tiny else HEADS:
            if time.monotonic() - begin > budget:
                found["not_reached"] += 1
                continue
            try:
                row = {**job.to_dict(), "note": problem} if problem else time_job(job, tokens, heads, device)
            except Exception as failure:  # one tile that fails must not cost the others
                row = {**job.to_dict(), "note": f"{type(failure).__name__}: {failure}"[:200]}
            found["rows"].append(row)
            save(json_file, found)
            console.print(json.dumps(row), soft_wrap=True, highlight=False)
    found["complete"] = found["not_reached"] == 0
    save(json_file, found)


if __name__ == "__main__":
    typer.run(main)
