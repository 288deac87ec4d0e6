"""Compile attention kernels with many tiles and say what each costs: the source of gim_kernels/triton/tiles.py.

Needs no GPU: registers, stack and instructions are read from the cubin with the tools inside the triton wheel. No row
has been timed on a GPU yet. Examples::

    python benchmarks/search_tiles.py --architecture cuda:90 --work grad_query --head-size 128 --dtype bfloat16
    python benchmarks/search_tiles.py --architecture cuda:80 --work forward --head-size 64 --tiles 128,64,8,3 128,32,4,2
    python benchmarks/search_tiles.py --architecture cuda:90 --check        # every row of the table, many options
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget

from gim_kernels.triton import tiles
from gim_kernels.triton.attention_forward import forward_variant
from gim_kernels.triton.attention_grad_key_value import grad_key_value_variant
from gim_kernels.triton.attention_grad_query import grad_query_variant
from gim_kernels.triton.tiles import Tile, Variant, Work

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: Registers of one multiprocessor, the same on every architecture from sm_80 on.
REGISTERS = 65536


def say(line: str) -> None:
    """One line of output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def variant(
    work: Work,
    architecture: str,
    dtype: torch.dtype,
    head_size: int,
    causal: bool,
    tile: Tile | None = None,
    **options: Any,
) -> Variant:
    """The variant that does ``work``; ``options`` are those of the variant functions."""
    rule = options.pop("rule", None)
    if work == "forward":
        return forward_variant(architecture, dtype, head_size, causal, tile=tile, **options)
    if work in ("grad_query", "grad_query_exact"):
        rule = "exact" if work == "grad_query_exact" else rule or "square"
        return grad_query_variant(architecture, dtype, head_size, rule, causal, tile=tile, **options)
    options.pop("sinks", None)
    rule = "constant" if work == "grad_value" else rule or "square"
    return grad_key_value_variant(
        architecture,
        dtype,
        head_size,
        rule,
        causal,
        grad_key=work != "grad_value",
        grad_value=work != "grad_key",
        tile=tile,
        **options,
    )


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs: ``stack`` and ``shared`` in bytes, the others in instructions or registers."""

    registers: int
    stack: int
    local: int
    shared: int
    hgmma: int
    hmma: int
    exponentials: int
    instructions: int

    def programs(self, warps: int, memory: int) -> int:
        """How many programs one multiprocessor holds at once."""
        by_registers = REGISTERS // (warps * 32 * ((self.registers + 7) // 8 * 8))
        return min(by_registers, memory // (self.shared + 1024), 64 // warps)


def cost(subject: Variant, architecture: str) -> Cost:
    """Compile for ``"cuda:<capability>"`` and read the cubin."""
    compiled = subject.compile(GPUTarget("cuda", int(architecture.split(":")[1]), 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout

    def count(pattern: str) -> int:
        return len(re.findall(pattern, listing))

    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Cost(
        registers=int(found[1]),
        stack=int(found[2]),
        local=count(r"\b(?:LDL|STL)\b"),
        shared=compiled.metadata.shared,
        hgmma=count(r"\bHGMMA"),
        hmma=count(r"\bHMMA"),
        exponentials=count(r"\bMUFU\.EX2"),
        instructions=count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/"),
    )


def candidates(dtype: torch.dtype) -> Iterator[Tile]:
    """Tiles worth compiling: on tensor cores, every warp holds at least 16 rows of the accumulators."""
    if dtype == torch.float32:
        sizes, stages = [(64, 64), (64, 32), (32, 64), (32, 32), (16, 32), (32, 16), (16, 16)], (2, 1)
        for (block_t, block_s), warps, stage in itertools.product(sizes, (4, 8), stages):
            yield Tile(block_t, block_s, warps, stage)
        return
    for block_t, block_s, stage in itertools.product((128, 64, 32, 16), (128, 64, 32, 16), (3, 2)):
        for warps in (4, 8):
            yield Tile(block_t, block_s, warps, stage)


def row(tile: Tile, found: Cost | str, work: Work, memory: int) -> str:
    """One line of the report."""
    head = f"{tile.block_t:4}x{tile.block_s:<4} {tile.num_warps} warps {tile.num_stages} stages"
    if isinstance(found, str):
        return f"{head}  does not compile: {found}"
    scores = tile.block_t * tile.block_s // (32 * tile.num_warps)
    verdict = "SPILLS" if found.stack or found.local else "ok"
    if found.shared > memory:
        verdict = "SHARED"
    return (
        f"{head}  {found.registers:3} registers  {found.stack:4} B stack {found.local:3} LDL/STL  "
        f"{found.shared / 1024:5.1f} KiB shared  {found.programs(tile.num_warps, memory)} per SM  "
        f"{found.hgmma:3} HGMMA {found.hmma:4} HMMA  {found.exponentials:3} EX2 ({scores} scores)  "
        f"{found.instructions:5} instructions  {verdict}"
    )


def compiled(subject: Variant, architecture: str) -> Cost | str:
    """:func:`cost`, or the compiler's last words."""
    try:
        return cost(subject, architecture)
    except Exception as error:  # the compiler's own exceptions share no base class
        return str(error).strip().splitlines()[-1][-100:] if str(error).strip() else type(error).__name__


#: Options that every row is held against, besides none at all.
EVERYTHING: dict[str, Any] = {"window": True, "softcap": True, "key_range": True}


def check(architecture: str, works: list[Work], sizes: list[int], dtypes: list[str]) -> int:
    """Compile every row of the table with and without all options; returns how many are bad."""
    bad = 0
    memory = tiles.shared_memory(architecture)
    for name, size, work in itertools.product(dtypes, sizes, works):
        dtype = DTYPES[name]
        for causal, options in itertools.product((True, False), ({}, EVERYTHING)):
            tile = tiles.attention_tile(work, architecture, size, dtype, bool(options))
            if work == "grad_key_value" and tile.split:
                continue
            extra: dict[str, Any] = {"sinks": torch.float32} if options and work in ("forward", "grad_query") else {}
            rules = ("square", "warm", "sharp") if work == "grad_query" else ("square", "warm", "exact")
            for rule in rules if work in ("grad_query", "grad_key_value", "grad_key") else (None,):
                found = compiled(
                    variant(work, architecture, dtype, size, causal, **options, **extra, rule=rule), architecture
                )
                line = row(tile, found, work, memory)
                good = line.endswith("ok")
                bad += not good
                say(
                    f"{architecture} {name:8} D{size:<3} {work:16} {rule or '':6} causal={causal:d} "
                    f"all={bool(options):d}  {line}",
                )
    return bad


def read_tile(text: str) -> Tile:
    """A tile from ``"block_t,block_s,warps,stages"``."""
    block_t, block_s, warps, stages = map(int, text.split(","))
    return Tile(block_t, block_s, warps, stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="cuda:90")
    parser.add_argument("--work", nargs="+", choices=get_args(Work), default=list(get_args(Work)))
    parser.add_argument("--head-size", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--rule", default=None)
    parser.add_argument("--no-causal", action="store_true")
    parser.add_argument("--all-options", action="store_true", help="with window, softcap, key_range and sinks")
    parser.add_argument("--split", action="store_true", help="grad_query in two passes")
    parser.add_argument("--tiles", nargs="+", help="block_t,block_s,warps,stages; without, every candidate")
    parser.add_argument("--check", action="store_true", help="compile the table's own rows")
    arguments = parser.parse_args()
    if arguments.check:
        bad = check(arguments.architecture, arguments.work, arguments.head_size, arguments.dtype)
        raise SystemExit(f"{bad} bad rows" if bad else 0)
    memory = tiles.shared_memory(arguments.architecture)
    for name, size, work in itertools.product(arguments.dtype, arguments.head_size, arguments.work):
        say(f"# {arguments.architecture} {name} D{size} {work}")
        chosen = [read_tile(text) for text in arguments.tiles] if arguments.tiles else list(candidates(DTYPES[name]))
        options: dict[str, Any] = dict(EVERYTHING) if arguments.all_options else {}
        if arguments.all_options and work in ("forward", "grad_query", "grad_query_exact"):
            options["sinks"] = torch.float32
        for tile in chosen:
            tile = Tile(tile.block_t, tile.block_s, tile.num_warps, tile.num_stages, split=arguments.split)
            subject = variant(
                work,
                arguments.architecture,
                DTYPES[name],
                size,
                not arguments.no_causal,
                tile,
                rule=arguments.rule,
                **options,
            )
            say(row(tile, compiled(subject, arguments.architecture), work, memory))


if __name__ == "__main__":
    main()
