"""The kernels ahead of time: which variants are built, their compiled files, and what the compiled code consists of.

``python -m gim_kernels.aot build`` writes what ``CMakeLists.txt`` makes a C library of, ``python -m gim_kernels.aot
report`` the table of registers, memory and instructions. Neither needs a GPU or a CUDA toolkit: triton brings its own
compiler, assembler and disassembler.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

#: What a build holds unless it is told otherwise.
TARGETS = ("cuda:80:32", "cuda:90:32")
HEAD_SIZES = (64, 80, 96, 128, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: What can hide a key, by what a variant must know of it. ``plain``: causality alone. ``general``: a window, a key
#: range and sinks, each of which the launcher can make neutral. ``softcap``: ``general`` with a softcap, which cannot
#: be neutral. float32 is there to check the others: it has no ``plain`` of its own and runs as ``general``.
MASKS = ("plain", "general", "softcap")
#: Rules of the query kernel. The key kernel does not tell ``sharp`` from ``warm``.
RULES = ("exact", "square", "warm", "sharp")
#: Rules that variants with a softcap know; all of those are causal.
SOFTCAP_RULES = ("exact", "square")
#: Rules that ``plain`` variants know: the others run as ``general``.
PLAIN_RULES = ("exact", "square")
#: Widths of norms whose tiles are built, the widest for every wider row too: fewer tiles than the launchers have.
NORM_WIDTHS = (128, 1024, 4096, 8192, 32768)
#: More columns than any row has.
UNLIMITED = 2**31 - 1


@dataclass(frozen=True)
class Entry:
    """A variant of the library.

    Args:
        key: what the library's launcher asks for, e.g. ``"attention_forward/bf16/128/causal/plain"``.
        limit: the most columns it takes; of several with one key the first that is wide enough is used.
        variant: a :class:`gim_kernels.triton.tiles.Variant`.
    """

    key: str
    limit: int
    variant: Any

    @property
    def path(self) -> str:
        """The key, and the limit where there is one: what patterns select by."""
        return self.key if self.limit == UNLIMITED else f"{self.key}/{self.limit}"

    @property
    def stem(self) -> str:
        """Name of its files in a build folder: of the entry, whatever tile it got."""
        return self.path.replace("/", "-")


def parse_target(target: str) -> tuple[str, int | str, int]:
    """Backend, architecture and warp size of ``"cuda:90:32"`` or ``"hip:gfx942:64"``.

    Raises:
        ValueError: another form.
    """
    parts = target.split(":")
    if len(parts) != 3 or parts[0] not in ("cuda", "hip") or not parts[2].isdigit():
        raise ValueError(f"a target must look like cuda:90:32 or hip:gfx942:64, got {target!r}")
    backend, architecture, warp_size = parts
    if backend == "cuda" and not architecture.isdigit():
        raise ValueError(f"a CUDA target must look like cuda:90:32, got {target!r}")
    return backend, int(architecture) if backend == "cuda" else architecture, int(warp_size)


def _attention(architecture: str, head_size: int, dtype: str) -> Iterable[Entry]:
    # Modules and not the functions of the same names that the package exports.
    forward = importlib.import_module("gim_kernels.triton.attention_forward")
    backward = importlib.import_module("gim_kernels.triton.attention_backward")
    fold = importlib.import_module("gim_kernels.triton.attention_fold")
    tiles = importlib.import_module("gim_kernels.triton.tiles")
    kind = DTYPES[dtype]
    yield Entry(f"attention_fold/{dtype}/{head_size}", UNLIMITED, fold.fold_parts_variant(kind, head_size))
    for causal in (True, False):
        for mask in MASKS:
            if (mask == "plain" and dtype == "fp32") or (mask == "softcap" and not causal):
                continue
            general, capped = mask != "plain", mask == "softcap"
            where = f"{dtype}/{head_size}/{'causal' if causal else 'full'}/{mask}"
            common = {"window": general, "softcap": capped, "key_range": general}
            sinks = torch.float32 if general else None
            arguments = (architecture, kind, head_size)
            # The library's tensors are aligned, but a key range wants pointers.
            common["described"] = not general and dtype != "fp32" and architecture in tiles.DESCRIBED
            pair = tiles.attention_tile("grad_key_value", architecture, head_size, kind, capped, common["described"])
            together = not pair.split
            yield Entry(
                f"attention_forward/{where}",
                UNLIMITED,
                forward.forward_variant(*arguments, causal, **common, sinks=sinks),
            )
            yield Entry(
                f"attention_grad_value/{where}",
                UNLIMITED,
                backward.grad_key_value_variant(*arguments, "constant", causal, **common, grad_key=False),
            )
            for rule in {"plain": PLAIN_RULES, "general": RULES, "softcap": SOFTCAP_RULES}[mask]:
                yield Entry(
                    f"attention_grad_query/{where}/{rule}",
                    UNLIMITED,
                    backward.grad_query_variant(*arguments, rule, causal, **common, sinks=sinks),
                )
                if rule != "sharp":
                    yield Entry(
                        f"attention_grad_key{'_value' if together else ''}/{where}/{rule}",
                        UNLIMITED,
                        backward.grad_key_value_variant(*arguments, rule, causal, **common, grad_value=together),
                    )


def _norms(dtype: str) -> Iterable[Entry]:
    norm = importlib.import_module("gim_kernels.triton.norm")
    tiles = importlib.import_module("gim_kernels.triton.pointwise_tiles")
    kind = DTYPES[dtype]
    for width in NORM_WIDTHS:
        tile, limit = tiles.norm_tile(width), width if width < NORM_WIDTHS[-1] else UNLIMITED
        for name, centre, bias in (
            ("rms", False, None),
            ("layer", True, None),
            ("layer_bias", True, kind),
        ):
            variant = norm.forward_variant(tile, kind, kind, bias, centre, True)
            yield Entry(f"norm_forward/{dtype}/{name}", limit, variant)
        for name, centre in (("rms", False), ("layer", True)):
            for statistic, x in (("live", kind), ("frozen", None)):
                variant = norm.backward_variant(tile, kind, x, kind, centre, True)
                yield Entry(f"norm_backward/{dtype}/{name}/{statistic}", limit, variant)
    for name, centre in (("rms", False), ("layer", True)):
        variant = norm.backward_weight_variant(kind, kind, centre, centre, True)
        yield Entry(f"norm_backward_weight/{dtype}/{name}", UNLIMITED, variant)


def _gated(dtype: str) -> Iterable[Entry]:
    gated = importlib.import_module("gim_kernels.triton.gated")
    tiles = importlib.import_module("gim_kernels.triton.pointwise_tiles")
    kind, tile = DTYPES[dtype], tiles.gated_tile(tiles.ELEMENTS_PER_PROGRAM)
    for activation in gated.ACTIVATIONS:
        variant = gated.forward_variant(tile, kind, activation, True)
        yield Entry(f"gated_forward/{dtype}/{activation}", UNLIMITED, variant)
        for backward in ("exact", "ratio"):
            variant = gated.backward_variant(tile, kind, activation, backward, (True, True), True)
            yield Entry(f"gated_backward/{dtype}/{activation}/{backward}", UNLIMITED, variant)


@functools.cache
def shipped(
    target: str,
    head_sizes: Sequence[int] = HEAD_SIZES,
    dtypes: Sequence[str] = tuple(DTYPES),
    only: Sequence[str] = ("*",),
) -> tuple[Entry, ...]:
    """The variants built for a target, sorted by key and limit.

    Args:
        target: as :func:`parse_target` takes it.
        head_sizes: of attention, multiples of 16 up to 256.
        dtypes: names among :data:`DTYPES`.
        only: patterns of what to keep, by :attr:`Entry.path`.

    Raises:
        ValueError: a target, head size or dtype that is none, or nothing left.
    """
    backend, architecture, _ = parse_target(target)
    for size in head_sizes:
        if size % 16 or not 16 <= size <= 256:
            raise ValueError(f"head sizes must be multiples of 16 from 16 to 256, got {size}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtypes must be among {tuple(DTYPES)}, got {dtype!r}")
    fold = importlib.import_module("gim_kernels.triton.norm").fold_variant()
    entries = [Entry("fold", UNLIMITED, fold)]
    for dtype in dtypes:
        entries += [*_norms(dtype), *_gated(dtype)]
        for size in head_sizes:
            entries += _attention(f"{backend}:{architecture}", size, dtype)
    kept = [entry for entry in entries if any(fnmatch.fnmatchcase(entry.path, p) for p in only)]
    if not kept:
        raise ValueError(f"no variant matches {tuple(only)}")
    return tuple(sorted(kept, key=lambda entry: (entry.key, entry.limit)))


@dataclass(frozen=True)
class Compiled:
    """What became of an entry on a target.

    Args:
        key, limit, name: of the entry and its variant.
        target: as :func:`parse_target` takes it.
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


#: Matrix instructions of NVIDIA's architectures: Hopper's for a warpgroup, Blackwell's, and a warp's.
_MATRIX = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA)\b")


#: Of nvdisasm's listing: a label, an instruction, and the label that a branch goes to.
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*\(?`?\((\.L\w+)\)")
#: float32 has no matrix instruction here: a loop over tiles is one with so many multiplications and additions.
_MANY_PRODUCTS = 32


def _loop_stores(code: str) -> list[int]:
    """Stores to local memory in each innermost loop over tiles, in the order of the code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            branch = _BRANCH.search(instruction[1])
            if branch and branch[1] in labels:  # back to what was there before
                loops.append((labels[branch[1]], len(instructions)))
            instructions.append(instruction[1])
    found = []
    for first, last in sorted(loops):
        inner = any(first <= low and high <= last and (low, high) != (first, last) for low, high in loops)
        body = instructions[first : last + 1]
        products = sum(bool(re.search(r"\bFFMA\b", text)) for text in body)
        if not inner and (products >= _MANY_PRODUCTS or any(map(_MATRIX.search, body))):
            found.append(sum(bool(re.search(r"\bSTL\b", text)) for text in body))
    return found


def _nvidia_resources(image: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()

        def output(tool: str, *arguments: str) -> str:
            command = [tool, *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        code = output(knobs.nvidia.nvdisasm.path, "--print-code")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, shared, local = map(int, found.groups())
    matrix: dict[str, int] = {}
    for kind in _MATRIX.findall(code):
        matrix[kind] = matrix.get(kind, 0) + 1
    return {
        "registers": registers,
        "stack": stack + local,
        "shared_static": shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loop_stores": _loop_stores(code),
        "matrix": dict(sorted(matrix.items())),
        "exponentials": len(re.findall(r"\bMUFU\.EX2\b", code)),
    }


def _amd_resources(assembly: str) -> dict[str, Any]:
    def number(field: str) -> int:
        return sum(map(int, re.findall(rf"^\s*\.{field}:\s*(\d+)", assembly, re.MULTILINE)))

    matrix: dict[str, int] = {}
    for kind in re.findall(r"^\s*(v_mfma_\w+)", assembly, re.MULTILINE):
        matrix[kind] = matrix.get(kind, 0) + 1
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "shared_static": 0,
        "spills": number("vgpr_spill_count"),
        "loop_stores": [],
        "matrix": dict(sorted(matrix.items())),
        "exponentials": len(re.findall(r"^\s*v_exp_f32", assembly, re.MULTILINE)),
    }


def _fingerprint(entry: Entry, target: str) -> str:
    import triton

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
    from triton import knobs
    from triton.backends.compiler import GPUTarget

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
        **(_nvidia_resources(image) if cuda else _amd_resources(compiled.asm["amdgcn"])),
    ), image


#: What selects variants, as :func:`shipped` takes it: target, head sizes, dtypes, patterns.
Selection = tuple[str, tuple[int, ...], tuple[str, ...], tuple[str, ...]]


def _folder(target: str) -> str:
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
    binary = Path(out) / _folder(target) / f"{entry.stem}.bin"
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


_KINDS = {"i32": "GIM_KIND_I32", "i64": "GIM_KIND_I64", "fp32": "GIM_KIND_FLOAT"}
#: An argument in C: its name, its kind, and the box of a descriptor.
_Argument = tuple[str, str, tuple[int, ...]]


def _c_arguments(row: Compiled) -> tuple[_Argument, ...]:
    return tuple(
        (
            name,
            "GIM_KIND_DESCRIPTOR" if name in row.boxes else _KINDS.get(kind, "GIM_KIND_POINTER"),
            tuple(row.boxes.get(name, (0, 0, 0))),
        )
        for name, kind in row.arguments
    )


def _c_sources(compiled: Sequence[Compiled], entries: Sequence[Entry], targets: Sequence[str]) -> dict[str, str]:
    """The table of ``cmake/gim_table.h`` in C, and the compiled files in assembler, by file name."""
    from gim_kernels.triton import order
    from gim_kernels.triton.pointwise_tiles import WEIGHT_GRADIENT_PROGRAMS

    rows = [(row, entry) for row, entry in zip(compiled, entries, strict=True) if row.target.startswith("cuda")]
    rows.sort(key=lambda pair: (parse_target(pair[0].target)[1], pair[0].key, pair[0].limit))
    lists: dict[tuple[_Argument, ...], int] = {}
    for row, _ in rows:
        lists.setdefault(_c_arguments(row), len(lists))
    table = ["/* Written by python -m gim_kernels.aot build. */", '#include "gim_table.h"', ""]
    for arguments, index in lists.items():
        table.append(f"static const gim_argument arguments_{index}[] = {{")
        for name, kind, (swizzle, box_rows, columns) in arguments:
            table.append(f"    {{GIM_ARGUMENT_{name}, {kind}, {swizzle}, {{{box_rows}, {columns}}}}},")
        table += ["};", ""]
    table += [f"extern const unsigned char gim_image_{index}[];" for index in range(len(rows))]
    table += ["", "const gim_variant gim_table[] = {"]
    for index, (row, _) in enumerate(rows):
        which = lists[_c_arguments(row)]
        table.append(
            f'    {{{parse_target(row.target)[1]}, "{row.key}", {row.limit}, gim_image_{index}, "{row.symbol}", '
            f"arguments_{which}, {len(row.arguments)}, {{{row.block[0]}, {row.block[1]}}}, {32 * row.warps}, "
            f'{row.shared}, "{row.target} {row.key}"}},'
        )
    cuda = [target for target in targets if target.startswith("cuda")]
    table += [
        "};",
        "const size_t gim_table_size = sizeof gim_table / sizeof gim_table[0];",
        f'const char gim_targets_built[] = "{";".join(cuda)}";',
        f"const int gim_weight_gradient_programs = {WEIGHT_GRADIENT_PROGRAMS};",
        f"const gim_order_numbers gim_order = {{{order.MULTIPROCESSORS}, {order.ENOUGH}, {order.START}, {order.FOLD}, "
        f"{order.CACHE}, {order.BALANCED!r}}};",
        "",
    ]
    images = ["/* Written by python -m gim_kernels.aot build. */", "    .section .rodata"]
    for index, (row, entry) in enumerate(rows):
        images += [
            "    .balign 64",
            f"    .globl gim_image_{index}",
            f"    .hidden gim_image_{index}",
            f"gim_image_{index}:",
            f'    .incbin "{_folder(row.target)}/{entry.stem}.bin"',
        ]
    images += ['    .section .note.GNU-stack,"",%progbits', ""]
    return {"gim_table.c": "\n".join(table), "gim_images.S": "\n".join(images)}


def build(selections: Sequence[Selection], out: Path, jobs: int | None = None) -> list[Compiled]:
    """Compile what ``selections`` name and write the C sources that hold it.

    Each target gets a folder of compiled files (``.bin``) and their descriptions (``.json``). CUDA targets go into
    ``gim_table.c`` and ``gim_images.S``, to be assembled with ``out`` as an include folder; code for HIP is left to
    loaders of its own.

    Args:
        selections: one for each target.
        out: the folder.
        jobs: processes; None for one on each core.
    """
    out.mkdir(parents=True, exist_ok=True)
    compiled = compile_all(selections, out, jobs)
    entries = [entry for selection in selections for entry in shipped(*selection)]
    wanted = {
        out / _folder(row.target) / f"{entry.stem}{end}"
        for row, entry in zip(compiled, entries, strict=True)
        for end in (".bin", ".json")
    }
    for folder in {path.parent for path in wanted}:
        for path in set(folder.iterdir()) - wanted:  # of an earlier build with other options
            path.unlink()
    for name, text in _c_sources(compiled, entries, [selection[0] for selection in selections]).items():
        (out / name).write_text(text)
    return compiled


def report_rows(compiled: Iterable[Compiled]) -> list[dict[str, Any]]:
    """The rows of the compile report, sorted by key, limit and target."""
    rows = []
    for row in sorted(compiled, key=lambda row: (row.key, row.limit, row.target)):
        fields = asdict(row)
        for name in ("fingerprint", "symbol", "arguments", "boxes", "name"):
            del fields[name]
        fields["limit"] = None if row.limit == UNLIMITED else row.limit
        fields["block"] = list(row.block)
        rows.append(fields)
    return rows


def _resources(row: dict[str, Any] | None) -> str:
    """Registers, stack, spills and stores in loops of a row, as columns; nothing where it was not compiled."""
    if row is None:
        return "| | | "
    stores = " ".join(map(str, row["loop_stores"])) or "-"
    return f"{row['registers']} | {row['stack']} | {row['spills']} | {stores}"


def _whole_tile_stores(row: dict[str, Any]) -> int:
    """Stores to local memory in the loops without a mask: all, or every second one."""
    passes = row["passes"] + row["key"].endswith("/sharp")  # one more, for the maximum
    return sum(row["loop_stores"][:: max(1, len(row["loop_stores"]) // passes)])


def _markdown(report: dict[str, Any]) -> str:
    """One line for each variant, with columns for each version of triton and a table for each target."""
    rows, beside = report["variants"], report["beside"]
    versions = [report["triton"], *([beside["triton"]] if beside else [])]
    lines = [
        "# Compile report",
        "",
        f"Compiled with triton {' and '.join(versions)} by `python -m gim_kernels.aot report`; nothing here was run.",
        "",
        "Tile: queries x keys (attention) or rows x columns, warps, stages. Registers and bytes of stack: for each "
        "thread. Spills: loads and stores of local memory. In loops: those stores in each loop over tiles, that over "
        "whole tiles first, then that over masked ones where there can be several, for each pass. Shared: KiB for each "
        "program. Matrix: matrix instructions in the code. ex2: exponentials in the code."
        + (f" On the right what triton {versions[1]} makes of it, where that was compiled." if beside else ""),
        "",
        "| target | triton | variants | most registers | stack | spills | in loops over whole tiles | most shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    targets = sorted({row["target"] for row in rows})
    for target in targets:
        for version, all_rows in zip(versions, (rows, beside.get("variants", [])), strict=False):
            here = [row for row in all_rows if row["target"] == target]
            if here:
                worst = [str(max(row[name] for row in here)) for name in ("registers", "stack", "spills")]
                worst.append(str(max(map(_whole_tile_stores, here))))
                worst.append(f"{max(row['shared'] for row in here) / 1024:g}")
                lines.append(f"| {target} | {version} | {len(here)} | {' | '.join(worst)} |")
    for target in targets:
        others = {(row["key"], row["limit"]): row for row in beside.get("variants", []) if row["target"] == target}
        head = "| variant | tile | registers | stack | spills | in loops | shared | matrix | ex2 |"
        rule = "|---|---|---|---|---|---|---|---|---|"
        if others:
            head += "".join(f" {name} {versions[1]} |" for name in ("registers", "stack", "spills", "in loops"))
            rule += "---|" * 4
        lines += ["", f"## {target}", "", head, rule]
        for row in rows:
            if row["target"] != target:
                continue
            width = "" if row["limit"] is None else f" up to {row['limit']}"
            tile = f"{row['block'][0]}x{row['block'][1]} {row['warps']}w {row['stages']}s"
            matrix = ", ".join(f"{count} {kind}" for kind, count in row["matrix"].items()) or "-"
            other = f" {_resources(others.get((row['key'], row['limit'])))} |" if others else ""
            lines.append(
                f"| {row['key']}{width} | {tile} | {_resources(row)} "
                f"| {(row['shared'] + row['shared_static']) / 1024:.3g} | {matrix} | {row['exponentials']} |{other}"
            )
    return "\n".join([*lines, ""])


def write_report(compiled: Iterable[Compiled], path: Path, beside: dict[str, Any] | None = None) -> None:
    """Write the report as ``path`` with the endings ``.json`` and ``.md``; the same input gives the same bytes.

    Args:
        compiled: the variants.
        path: without an ending.
        beside: a report that another version of triton made, to be shown next to this one.
    """
    import triton

    def listed(rows: Iterable[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"

    rows = report_rows(compiled)
    other = {} if beside is None else {"triton": beside["triton"], "variants": beside["variants"]}
    head = {"triton": triton.__version__, "targets": sorted({row["target"] for row in rows})}
    text = f'{json.dumps(head)[:-1]}, "variants": {listed(rows)}, "beside": '
    text += f'{{"triton": "{other["triton"]}", "variants": {listed(other["variants"])}}}}}\n' if other else "{}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(text)
    path.with_suffix(".md").write_text(_markdown({**head, "variants": rows, "beside": other}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gim_kernels.aot", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("build", "compiled files and the C sources that hold them"),
        ("report", "the table of what the compiled code consists of"),
        ("list", "the names of the variants, one a line"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--targets", default=";".join(TARGETS), help='e.g. "cuda:80:32;hip:gfx942:64"; commas do as well'
        )
        command.add_argument("--head-sizes", default=";".join(map(str, HEAD_SIZES)), help='e.g. "64;128"')
        command.add_argument("--dtypes", default=";".join(DTYPES), help='e.g. "bf16;fp16"')
        command.add_argument("--only", default="*", help='patterns of names, e.g. "norm_*;*/causal/plain/square"')
        if name == "list":
            continue
        command.add_argument("--jobs", type=int, default=None, help="processes; by default one on each core")
        command.add_argument("--out", type=Path, required=True, help="folder (build), file without ending (report)")
    report = commands.choices["report"]
    report.add_argument("--build", type=Path, default=None, help="folder of compiled files to use and to add to")
    report.add_argument("--beside", type=Path, default=None, help="report (.json) of another triton to show next to it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = _parser().parse_args(arguments)

    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.replace(",", ";").split(";") if part)

    try:
        sizes = tuple(int(size) for size in names(given.head_sizes))
        selections: list[Selection] = [
            (target, sizes, names(given.dtypes), names(given.only)) for target in names(given.targets)
        ]
        if not selections:
            raise ValueError("targets must name at least one")
        for selection in selections:
            shipped(*selection)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if given.command == "list":
        for selection in selections:
            for entry in shipped(*selection):
                sys.stdout.write(f"{selection[0]} {entry.path}\n")
    elif given.command == "build":
        build(selections, given.out, given.jobs)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            compiled = compile_all(selections, given.build or Path(scratch), given.jobs)
        beside = None if given.beside is None else json.loads(given.beside.read_text())
        write_report(compiled, given.out, beside)
    return 0


if __name__ == "__main__":
    sys.exit(main())
