"""Compile attention kernels with many tiles and say what each costs: the source of gim_kernels/triton/tiles.py.

Needs no GPU: registers, stack and instructions are read from the cubin with the tools inside the triton wheel. No row
has been timed on a GPU yet. Examples::

    python -m benchmarks.search_tiles --architecture cuda:90 --work grad_query --head-size 128 --described
    python -m benchmarks.search_tiles --architecture cuda:80 --work forward --head-size 64 --tiles 128,64,8,3 128,32,4,2
    python -m benchmarks.search_tiles --architecture cuda:90 --check        # every row of the table, many options
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from triton.backends.compiler import GPUTarget

from gim_kernels.aot.resources import of_nvidia, whole_tile_stores
from gim_kernels.triton import tiles
from gim_kernels.triton.attention_grad_key_value import grad_key_value_variant
from gim_kernels.triton.attention_grad_query import grad_query_variant
from gim_kernels.triton.attention_out import forward_variant
from gim_kernels.triton.tiles import Tile, Variant, Work

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
    """What a compiled kernel needs, and how often it goes over its tiles.

    Args:
        shared: bytes for each program.
        passes: over its tiles: the sums, delta before them, and the maximum before that.
        code: what :func:`gim_kernels.aot.resources.of_nvidia` finds.
    """

    shared: int
    passes: int
    code: dict[str, Any]

    def programs(self, warps: int, memory: int) -> int:
        """How many programs one multiprocessor holds at once."""
        by_registers = REGISTERS // (warps * 32 * ((self.code["registers"] + 7) // 8 * 8))
        return min(by_registers, memory // (self.shared + 1024), 64 // warps)

    def verdict(self, memory: int) -> str:
        """``"ok"``, or what is wrong: too much shared memory, or local memory written in a loop over whole tiles."""
        if self.shared > memory:
            return "SHARED"
        return "SPILLS" if whole_tile_stores(self.code["loop_stores"], self.passes) else "ok"


def cost(subject: Variant, architecture: str) -> Cost:
    """Compile for ``"cuda:<capability>"`` and look at the code."""
    compiled = subject.compile(GPUTarget("cuda", int(architecture.split(":")[1]), 32))
    code = of_nvidia(compiled.asm["cubin"])
    passes = 1 + bool(subject.constants.get("TWO_PASSES")) + (subject.constants.get("RULE") == "sharp")
    return Cost(compiled.metadata.shared + code["shared_static"], passes, code)


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


def row(tile: Tile, found: Cost | str, memory: int) -> str:
    """One line of the report."""
    head = f"{tile.block_t:4}x{tile.block_s:<4} {tile.num_warps} warps {tile.num_stages} stages"
    if isinstance(found, str):
        return f"{head}  does not compile: {found}"
    scores, code = tile.block_t * tile.block_s // (32 * tile.num_warps), found.code
    matrix = " ".join(f"{count:4} {kind}" for kind, count in code["matrix"].items())
    stores = " ".join(map(str, code["loop_stores"]))
    return (
        f"{head}  {code['registers']:3} registers  {code['stack']:4} B stack {code['spills']:3} LDL/STL "
        f"({stores} in loops)  {found.shared / 1024:5.1f} KiB shared  {found.programs(tile.num_warps, memory)} per SM  "
        f"{matrix}  {code['exponentials']:3} EX2 ({scores} scores)  {found.verdict(memory)}"
    )


def compiled(subject: Variant, architecture: str) -> Cost | str:
    """:func:`cost`, or the compiler's last words."""
    try:
        return cost(subject, architecture)
    except Exception as error:  # the compiler's own exceptions share no base class
        return str(error).strip().splitlines()[-1][-100:] if str(error).strip() else type(error).__name__


#: Options that every row is held against, besides none at all.
EVERYTHING: dict[str, Any] = {"window": True, "softcap": True, "key_range": True, "sinks": torch.float32}
#: The same for tiles that are read through descriptors: see :func:`gim_kernels.triton.launch.described`.
EVERYTHING_DESCRIBED: dict[str, Any] = {"described": True, "window": True, "sinks": torch.float32}


def knows_descriptors(architecture: str, dtype: torch.dtype) -> bool:
    """Whether matrices of a type can be read through descriptors."""
    return architecture in tiles.DESCRIBED and dtype.itemsize == 2


def options_of(architecture: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What each row of the table is compiled with in turn: through pointers, and through descriptors where they are."""
    described = [{"described": True}, EVERYTHING_DESCRIBED] if knows_descriptors(architecture, dtype) else []
    return [{}, EVERYTHING, *described]


def check(architecture: str, works: list[Work], sizes: list[int], dtypes: list[str]) -> int:
    """Compile every row of the table with and without all options; returns how many are bad."""
    bad = 0
    memory = tiles.shared_memory(architecture)
    for name, size, work in itertools.product(dtypes, sizes, works):
        dtype = DTYPES[name]
        for causal, options in itertools.product((True, False), options_of(architecture, dtype)):
            described = options.get("described", False)
            tile = tiles.attention_tile(work, architecture, size, dtype, options.get("softcap", False), described)
            if work == "grad_key_value" and tile.split:
                continue
            rules = ("square", "warm", "sharp") if work == "grad_query" else ("square", "warm", "exact")
            for rule in rules if work in ("grad_query", "grad_key_value", "grad_key") else (None,):
                found = compiled(
                    variant(work, architecture, dtype, size, causal, tile, rule=rule, **options), architecture
                )
                bad += isinstance(found, str) or found.verdict(memory) != "ok"
                say(
                    f"{architecture} {name:8} D{size:<3} {work:16} {rule or '':6} causal={causal:d} "
                    f"all={'window' in options:d} described={described:d}  {row(tile, found, memory)}",
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
    parser.add_argument("--all-options", action="store_true", help="with all that a kernel can have at once")
    parser.add_argument("--split", action="store_true", help="grad_query in two passes")
    parser.add_argument("--described", action="store_true", help="read through tensor descriptors (TMA)")
    parser.add_argument("--tiles", nargs="+", help="block_t,block_s,warps,stages; without, every candidate")
    parser.add_argument("--check", action="store_true", help="compile the table's own rows")
    arguments = parser.parse_args()
    if arguments.check:
        bad = check(arguments.architecture, arguments.work, arguments.head_size, arguments.dtype)
        raise SystemExit(f"{bad} bad rows" if bad else 0)
    memory = tiles.shared_memory(arguments.architecture)
    for name, size, work in itertools.product(arguments.dtype, arguments.head_size, arguments.work):
        if arguments.described and not knows_descriptors(arguments.architecture, DTYPES[name]):
            parser.error(f"{name} is not read through descriptors on {arguments.architecture}")
        say(f"# {arguments.architecture} {name} D{size} {work}")
        chosen = [read_tile(text) for text in arguments.tiles] if arguments.tiles else list(candidates(DTYPES[name]))
        options: dict[str, Any] = {"described": arguments.described}
        if arguments.all_options:
            options = EVERYTHING_DESCRIBED if arguments.described else EVERYTHING
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
            say(row(tile, compiled(subject, arguments.architecture), memory))


if __name__ == "__main__":
    main()
