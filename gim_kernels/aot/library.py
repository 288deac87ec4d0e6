"""The sources in C and assembler that make a library of compiled variants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gim_kernels.aot.compiled import Compiled, Selection, compile_all, folder_of
from gim_kernels.aot.variants import Entry, parse_target, shipped
from gim_kernels.triton import order
from gim_kernels.triton.pointwise_tiles import WEIGHT_GRADIENT_PROGRAMS

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
            f'    .incbin "{folder_of(row.target)}/{entry.stem}.bin"',
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
        out / folder_of(row.target) / f"{entry.stem}{end}"
        for row, entry in zip(compiled, entries, strict=True)
        for end in (".bin", ".json")
    }
    for folder in {path.parent for path in wanted}:
        for path in set(folder.iterdir()) - wanted:  # of an earlier build with other options
            path.unlink()
    for name, text in _c_sources(compiled, entries, [selection[0] for selection in selections]).items():
        (out / name).write_text(text)
    return compiled
