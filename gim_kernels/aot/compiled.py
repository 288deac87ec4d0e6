"""Variants compiled, several at a time, into a folder that keeps what has not changed."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from gim_kernels.aot import resources
from gim_kernels.aot.variants import Entry, parse_target, shipped


@dataclass(frozen=True)
class Compiled:
    """What became of an entry on a target.

    Args:
        key, limit, name: of the entry and its variant.
        target: as :func:`gim_kernels.aot.variants.parse_target` takes it.
        fingerprint: changes with the kernel's source, the choices made, triton's version and the target.
        symbol: of the kernel in its file.
        arguments: name and triton type of what a launch passes, in order.
        boxes: of each descriptor among them, by name: the swizzle (a ``CUtensorMapSwizzle``), and the rows and columns
            that one copy brings.
        block: the tile's rows and columns: queries and keys for attention.
        passes: how often the kernel goes over its scores.
        warps, stages: launch options.
        registers: for each thread.
        stack: bytes for each thread.
        shared, shared_static: bytes for each program, asked for at launch and reserved by the file.
        spills: instructions that read or write local memory.
        loop_stores: instructions that write it in each loop over tiles: first that without a mask, then that with one
            unless one tile at most needs it, for each pass. Empty on AMD GPUs, whose loops are not looked at.
        matrix: matrix instructions by kind.
        exponentials: instructions that find a power of two.
        bytes: size of the compiled file.
    """

    key: str
    limit: int
    name: str
    target: str
    fingerprint: str
    symbol: str
    arguments: tuple[tuple[str, str], ...]
    boxes: dict[str, list[int]]
    block: tuple[int, int]
    passes: int
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    shared_static: int
    spills: int
    loop_stores: list[int]
    matrix: dict[str, int]
    exponentials: int
    bytes: int


def _fingerprint(entry: Entry, target: str) -> str:
    parts = [triton.__version__, target, entry.variant.source().hash(), str(entry.variant.options())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _box(description: dict[str, Any]) -> list[int]:
    """Swizzle, rows and columns of a descriptor as triton's metadata has it."""
    *_, rows, columns = description["block_size"]
    return [description["swizzle"], rows, columns]


def compile_entry(entry: Entry, target: str) -> tuple[Compiled, bytes]:
    """Compile an entry for a target, and look at what came out.

    Raises:
        RuntimeError: the kernel wants memory that the library's launcher does not give it.
    """
    variant = entry.variant
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        # The result is kept, not triton's files; line tables would treble its size and hold this machine's paths.
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True
        compiled = variant.compile(GPUTarget(*parse_target(target)))
    metadata = compiled.metadata
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            raise RuntimeError(f"{variant.name} needs {scratch}, which the library does not provide")
    cuda = target.startswith("cuda")
    image = compiled.asm["cubin" if cuda else "hsaco"]
    constants = variant.constants
    arguments = tuple((name, kind) for name, kind in variant.signature.items() if kind != "constexpr")
    described = [name for name, kind in arguments if kind.startswith("tensordesc")]
    block = ("BLOCK_T", "BLOCK_S") if "BLOCK_T" in constants else ("BLOCK_ROWS", "BLOCK_COLUMNS")
    return Compiled(
        key=entry.key,
        limit=entry.limit,
        name=variant.name,
        target=target,
        fingerprint=_fingerprint(entry, target),
        symbol=metadata.name,
        arguments=arguments,
        boxes=dict(zip(described, map(_box, metadata.tensordesc_meta or ()), strict=True)),
        block=(constants[block[0]], constants[block[1]]),
        passes=2 if constants.get("TWO_PASSES") else 1,
        warps=variant.num_warps,
        stages=variant.num_stages,
        shared=metadata.shared,
        bytes=len(image),
        **(resources.of_nvidia(image) if cuda else resources.of_amd(compiled.asm["amdgcn"])),
    ), image


#: What selects variants, as :func:`gim_kernels.aot.variants.shipped` takes it: target, head sizes, dtypes, patterns.
Selection = tuple[str, tuple[int, ...], tuple[str, ...], tuple[str, ...]]


def folder_of(target: str) -> str:
    """The name of the folder of a target's files."""
    return target.replace(":", "_")


def _read(path: Path) -> Compiled | None:
    """What an earlier build wrote, or None."""
    try:
        fields = json.loads(path.read_text())
        fields["arguments"] = tuple((name, kind) for name, kind in fields["arguments"])
        fields["block"] = tuple(fields["block"])
        return Compiled(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _build_one(selection: Selection, index: int, out: str) -> Compiled:
    """Compile an entry into a build folder, unless the folder holds it already."""
    entry, target = shipped(*selection)[index], selection[0]
    binary = Path(out) / folder_of(target) / f"{entry.stem}.bin"
    known = _read(binary.with_suffix(".json"))
    if known and known.fingerprint == _fingerprint(entry, target) and binary.exists():
        return known
    compiled, image = compile_entry(entry, target)
    binary.parent.mkdir(parents=True, exist_ok=True)
    binary.write_bytes(image)
    binary.with_suffix(".json").write_text(json.dumps(asdict(compiled), indent=1) + "\n")
    return compiled


def compile_all(selections: Sequence[Selection], out: Path, jobs: int | None = None) -> list[Compiled]:
    """Compile what ``selections`` name into the folder ``out``, several at a time; in order, whoever was first.

    Args:
        selections: one for each target.
        out: where files are kept; what is there and has not changed is not compiled again.
        jobs: processes; None for one on each core.
    """
    tasks = [(selection, index) for selection in selections for index in range(len(shipped(*selection)))]
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    if jobs == 1:
        return [_build_one(selection, index, str(out)) for selection, index in tasks]
    done: list[Compiled] = []
    # New processes, not forks: torch and triton have threads.
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_build_one, selection, index, str(out)) for selection, index in tasks]
        try:
            for count, future in enumerate(futures, 1):
                done.append(future.result())
                if count % 50 == 0 or count == len(futures):
                    sys.stderr.write(f"{count}/{len(futures)} variants\n")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done
