"""Tile sizes of the attention kernels, one table, and what a compiled kernel consists of.

Nothing is tuned at run time: :func:`attention_tile` is a pure function of the kernel, the architecture, the head size,
the width of the dtype and the rule. The rows were chosen with ``benchmarks/search_tiles.py``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton

#: What a program accumulates decides its tile: the output; A and B or, with T = 1, A alone; two gradients or one.
Work = Literal["forward", "grad_query", "grad_query_exact", "grad_key_value", "grad_key", "grad_value"]
#: How a kernel finds the softmax at temperature T. ``exact``: T = 1, delta from the output. ``square``: T = 2, whose
#: square is the softmax at T = 1. ``warm``: any T >= 1. ``sharp``: T < 1, where exp((S' - LSE) / T) would underflow.
Rule = Literal["constant", "exact", "square", "warm", "sharp"]


@dataclass(frozen=True)
class Variant:
    """One kernel with every compile-time choice made: what the launchers run and what is built ahead of time.

    Args:
        name: unique, a C identifier.
        kernel: the ``@triton.jit`` function.
        signature: triton type of every argument in order: ``"*bf16"``, ``"*fp32"``, ``"i32"``, ``"i64"``, ``"fp32"``,
            and ``"constexpr"`` for those in ``constants``.
        constants: value of every constexpr argument; an absent pointer is a constant None.
        divisible: arguments that must be multiples of 16 (pointers: 16-byte aligned) when this binary is launched.
            The launchers do not need it, triton looks at the values itself.
        num_warps, num_stages: launch options.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int

    def source(self) -> Any:
        """The ``ASTSource`` that ``triton.compile`` takes. Impossible in a process that runs triton's interpreter."""
        from triton.compiler import ASTSource

        if not isinstance(self.kernel, triton.JITFunction):
            raise RuntimeError(f"{self.name} cannot be compiled while triton's interpreter is on (TRITON_INTERPRET)")
        order = list(self.signature)
        attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in self.divisible}
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)

    def options(self) -> dict[str, int]:
        """The options that ``triton.compile`` and a launch take."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def compile(self, target: Any) -> Any:
        """Compile for a ``GPUTarget``, with or without a GPU here; ``.asm["cubin"]`` and the like hold the result."""
        return triton.compile(self.source(), target=target, options=self.options())

    def launch(self, programs: int, **arguments: Any) -> Any:
        """Run ``programs`` programs with the kernel's arguments that are not upper case, absent pointers as None.

        Returns:
            What triton compiled; None from the interpreter.
        """
        switches = {name: value for name, value in self.constants.items() if name.isupper()}
        return self.kernel[(programs,)](**arguments, **switches, **self.options())


@dataclass(frozen=True)
class Tile:
    """How much of the scores one program holds at once, and who works on it.

    Args:
        block_t: queries.
        block_s: keys.
        num_warps, num_stages: launch options of triton.
        evidence: what the row rests on.
        split: the work is done in two goes with half the accumulators and a product more: ``grad_query`` finds delta
            in a pass of its own, ``grad_key_value`` launches ``grad_key`` and ``grad_value`` instead.
    """

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    evidence: str = ""
    split: bool = False


def architecture_of(x: torch.Tensor) -> str:
    """``"cuda:90"``, ``"hip:gfx942"`` and the like for a tensor on a GPU; ``"interpreter"`` for one on a CPU."""
    return _architecture(x.get_device()) if x.is_cuda else "interpreter"


@functools.cache
def _architecture(index: int) -> str:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return f"hip:{properties.gcnArchName.split(':')[0]}"
    return f"cuda:{properties.major}{properties.minor}"


#: Bytes of shared memory that one program may have.
_SHARED_MEMORY = {
    "cuda:80": 163 * 1024,
    "cuda:86": 99 * 1024,
    "cuda:87": 163 * 1024,
    "cuda:89": 99 * 1024,
    "cuda:90": 227 * 1024,
    "cuda:100": 227 * 1024,
    "cuda:103": 227 * 1024,
    "hip:gfx950": 160 * 1024,
}


def shared_memory(architecture: str) -> int:
    """Bytes of shared memory that one program may have on an architecture; the least known for those not listed."""
    return _SHARED_MEMORY.get(architecture, 64 * 1024 if architecture.startswith("hip") else 99 * 1024)


def _family(architecture: str) -> str:
    """Which rows of the table an architecture takes.

    sm_100 was compiled with those of sm_90, gfx942 with those of sm_80, neither run. Those of sm_80 fit into 99 KiB of
    shared memory, which is what all others have at least.
    """
    return "cuda:90" if architecture in ("cuda:90", "cuda:100", "cuda:103") else "cuda:80"


#: What every row of the table rests on until a GPU has timed it.
COMPILED = (
    "no loop over whole tiles writes to local memory where compiled (benchmarks/results/compile_report.md); "
    "never timed on a GPU"
)


def _rows(**tiles: tuple[int, int, int, int] | None) -> dict[Work, Tile]:
    """Rows from (block_t, block_s, warps, stages); without a tile, ``grad_key_value`` is split."""
    rows: dict[Work, Tile] = {}
    for name, numbers in tiles.items():
        work, _, split = name.partition("__")
        rows[work] = Tile(*(numbers or (0, 0, 0, 0)), COMPILED, split=split == "split")  # type: ignore[index]
    return rows


#: By family, bytes of the dtype and padded head size (16 and 32 take the rows of 64).
#:
#: On sm_80 triton gives each warp rows of its own where the accumulators have as many rows as columns, or more.
#: Elsewhere all warps hold the same rows and split the columns of the scores, in eights: with fewer than 8 columns for
#: each warp they would repeat one another's products and exponentials, as the compile report would show.
_TABLE: dict[tuple[str, int, int], dict[Work, Tile]] = {
    ("cuda:90", 2, 64): _rows(
        forward=(128, 64, 8, 3),
        grad_query=(128, 64, 8, 2),
        grad_query_exact=(64, 64, 4, 2),
        grad_key_value=(64, 128, 8, 2),
        grad_key=(64, 128, 8, 2),
        grad_value=(64, 128, 8, 3),
    ),
    ("cuda:90", 2, 128): _rows(
        forward=(128, 64, 8, 3),
        grad_query=(128, 32, 8, 3),
        grad_query_exact=(128, 64, 8, 2),
        grad_key_value=(32, 128, 8, 3),
        grad_key=(32, 128, 8, 2),
        grad_value=(64, 128, 8, 2),
    ),
    ("cuda:90", 2, 256): _rows(
        forward=(128, 32, 8, 2),
        grad_query__split=(128, 32, 8, 2),
        grad_query_exact=(128, 32, 8, 2),
        grad_key_value__split=None,
        grad_key=(16, 128, 8, 2),
        grad_value=(32, 128, 8, 2),
    ),
    ("cuda:80", 2, 64): _rows(
        forward=(128, 64, 8, 3),
        grad_query=(64, 32, 4, 3),
        grad_query_exact=(64, 32, 4, 3),
        grad_key_value=(32, 64, 4, 3),
        grad_key=(32, 64, 4, 3),
        grad_value=(64, 64, 4, 2),
    ),
    ("cuda:80", 2, 128): _rows(
        forward=(128, 32, 8, 3),
        grad_query=(128, 16, 8, 3),
        grad_query_exact=(128, 32, 8, 2),
        grad_key_value=(16, 128, 8, 3),
        grad_key=(32, 128, 8, 2),
        grad_value=(64, 128, 8, 2),
    ),
    ("cuda:80", 2, 256): _rows(
        forward=(32, 32, 4, 2),
        grad_query=(16, 32, 4, 2),
        grad_query_exact=(32, 32, 4, 2),
        grad_key_value__split=None,
        grad_key=(32, 32, 4, 2),
        grad_value=(32, 32, 4, 2),
    ),
    ("cuda:80", 4, 64): _rows(
        forward=(32, 16, 4, 2),
        grad_query=(16, 16, 4, 2),
        grad_query_exact=(16, 32, 4, 2),
        grad_key_value=(16, 32, 4, 2),
        grad_key=(16, 32, 4, 2),
        grad_value=(32, 32, 4, 2),
    ),
    ("cuda:80", 4, 128): _rows(
        forward=(32, 16, 8, 2),
        grad_query=(16, 16, 8, 2),
        grad_query_exact=(32, 16, 8, 2),
        grad_key_value__split=None,
        grad_key=(16, 32, 4, 2),
        grad_value=(16, 32, 8, 2),
    ),
    ("cuda:80", 4, 256): _rows(
        forward=(16, 32, 8, 2),
        grad_query=(16, 16, 8, 2),
        grad_query_exact=(16, 32, 8, 2),
        grad_key_value__split=None,
        grad_key=(16, 16, 4, 2),
        grad_value=(16, 32, 8, 2),
    ),
}


#: Better tiles that need more than 99 KiB of shared memory.
_WITH_ROOM: dict[tuple[str, int, int], dict[Work, Tile]] = {
    ("cuda:80", 2, 256): _rows(forward=(64, 64, 8, 2), grad_value=(64, 64, 8, 2)),
}


#: What would spill in the tile above where the scores are capped.
_WITH_SOFTCAP: dict[tuple[str, int, int], dict[Work, Tile]] = {
    ("cuda:90", 2, 128): _rows(grad_key_value__split=None),
}


#: Where matrices of two bytes are read through tensor descriptors (TMA), and the interpreter, which knows them too.
DESCRIBED = ("cuda:90", "interpreter")
#: The tiles of kernels that do. A tile of 64 keys or queries on the inner side keeps the products of two matrices in
#: shared memory below what that can deliver; the addresses of plain pointers take the registers that this needs.
_WITH_DESCRIPTORS: dict[tuple[str, int, int], dict[Work, Tile]] = {
    ("cuda:90", 2, 64): _rows(
        forward=(128, 128, 8, 2),
        grad_key_value=(64, 128, 8, 3),
    ),
    ("cuda:90", 2, 128): _rows(
        forward=(128, 128, 8, 2),
        grad_query=(128, 64, 8, 2),
        grad_key_value=(64, 128, 8, 2),
    ),
    ("cuda:90", 2, 256): _rows(
        forward=(128, 64, 8, 2),
        grad_key=(32, 128, 8, 2),
        grad_value=(64, 128, 8, 2),
    ),
}


def attention_tile(
    work: Work, architecture: str, head_size: int, dtype: torch.dtype, softcap: bool = False, described: bool = False
) -> Tile:
    """The tile of a kernel: a pure function of what is known before a launch.

    Args:
        work: what the program accumulates.
        architecture: as :func:`architecture_of` gives it.
        head_size: D.
        dtype: of the matrices.
        softcap: whether the scores are capped, which needs more registers.
        described: whether matrices are read through tensor descriptors.
    """
    if architecture == "interpreter":
        split = head_size > 128 and work in ("grad_query", "grad_key_value")
        return Tile(64, 32, 4, 2, "for the interpreter: any tile runs, large ones run faster", split)
    width = dtype.itemsize
    # float32 runs on the ordinary cores, which are alike everywhere. Whether three products of TF32 on tensor cores
    # keep the budget of errors depends on how those round (tests/gim_kernels/test_tf32.py), which only a GPU can tell.
    rows = ("cuda:80" if width == 4 else _family(architecture), width, max(64, padded_head(head_size)))
    tile = _TABLE[rows][work]
    if shared_memory(architecture) > 160 * 1024:
        tile = _WITH_ROOM.get(rows, {}).get(work, tile)
    if described:
        tile = _WITH_DESCRIPTORS.get(rows, {}).get(work, tile)
    if softcap:
        tile = _WITH_SOFTCAP.get(rows, {}).get(work, tile)
    if architecture.startswith("hip"):  # 64 KiB of local memory
        tile = dataclasses.replace(tile, num_stages=min(tile.num_stages, 2))
    return tile


def padded_head(head_size: int) -> int:
    """The power of two, at least 16, that a tile gives to the head size."""
    return max(16, triton.next_power_of_2(head_size))


#: Triton's names of dtypes.
TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
#: Pointers whose elements are not of the kernel's dtype.
_POINTERS = {
    "key_range_ptr": "*i32",
    **dict.fromkeys(("lse_ptr", "shift_ptr", "norm_ptr", "delta_ptr", "grad_sink_ptr", "partial_ptr"), "*fp32"),
}
#: Matrices that a descriptor can stand for, and whether their rows are queries or keys.
_READ = {"grad_out": "t", "query": "t", "key": "s", "value": "s"}
_INTEGERS = ("heads", "group", "members", "section", "queries", "keys", "window")


@dataclass(frozen=True)
class _Types:
    """Triton's types of an attention kernel's arguments.

    Args:
        short, sinks: the dtypes of the matrices and of the sinks.
        tile, width: the shape of what a descriptor reads at once.
        described: whether matrices are read through tensor descriptors.
    """

    short: str
    sinks: str
    tile: Tile
    width: int
    described: bool

    def of(self, name: str) -> str:
        """The type of the argument of a name."""
        matrix = name.removesuffix("_ptr")
        if self.described and matrix in _READ:
            rows = self.tile.block_t if _READ[matrix] == "t" else self.tile.block_s
            return f"tensordesc<{self.short}[1, 1, {rows}, {self.width}]>"
        if name == "sinks_ptr":
            return f"*{self.sinks}"
        if name.endswith("_ptr"):
            return _POINTERS.get(name, f"*{self.short}")
        if "_stride_" in name:
            return "i64"
        return "i32" if name in _INTEGERS else "fp32"


def attention_variant(
    kernel: Any,
    tile: Tile,
    dtype: torch.dtype,
    head_size: int,
    switches: Mapping[str, Any],
    present: Mapping[str, bool],
    sinks: torch.dtype | None = None,
    described: bool = False,
) -> Variant:
    """An attention kernel with its tile and its switches.

    Args:
        kernel: the ``@triton.jit`` function; its argument names say what they are.
        tile: block sizes and launch options.
        dtype: of the matrices.
        head_size: D.
        switches: values of constexpr arguments besides the block sizes.
        present: of the arguments that may be None, which are given; those not named are.
        sinks: dtype of the sinks.
        described: whether it reads matrices through tensor descriptors, which know their strides.
    """
    short = TRITON_TYPES[dtype]
    constants: dict[str, Any] = {
        **switches,
        "HEAD_SIZE": head_size,
        "BLOCK_D": padded_head(head_size),
        "BLOCK_T": tile.block_t,
        "BLOCK_S": tile.block_s,
        "PRECISE": dtype == torch.float32,
        **{name: None for name, given in present.items() if not given},
    }
    if described:
        strides = [name for name in kernel.arg_names if name.startswith(tuple(f"{name}_stride" for name in _READ))]
        constants |= dict.fromkeys(strides)
    types = _Types(short, TRITON_TYPES[sinks or torch.float32], tile, constants["BLOCK_D"], described)
    signature = {name: "constexpr" if name in constants else types.of(name) for name in kernel.arg_names}
    wide = head_size % 16 == 0
    divisible = tuple(
        name
        for name, kind in signature.items()
        if (kind == "i64" and wide) or (kind.startswith("*") and name not in ("key_range_ptr", "sinks_ptr"))
    )
    parts = [kernel.__name__.removesuffix("_kernel"), short, f"d{head_size}"]
    parts += [
        str(value).lower() if not isinstance(value, bool) else name.lower()
        for name, value in switches.items()
        if value is not False
    ]
    parts += ["described"] if described else []
    parts += [("" if given else "no_") + name.removesuffix("_ptr") for name, given in present.items()]
    return Variant("_".join(["gim", *parts]), kernel, signature, constants, divisible, tile.num_warps, tile.num_stages)
