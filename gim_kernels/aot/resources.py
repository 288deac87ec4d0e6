"""What compiled code consists of, read from the code itself by the tools that triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from triton import knobs

#: Matrix instructions of NVIDIA's architectures: Hopper's for a warpgroup, Blackwell's, and a warp's.
_MATRIX = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA)\b")


#: Of nvdisasm's listing: a label, an instruction, and the label that a branch goes to.
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*\(?`?\((\.L\w+)\)")
#: float32 has no matrix instruction here: a loop over tiles is one with so many multiplications and additions.
_MANY_PRODUCTS = 32


def loop_stores(code: str) -> list[int]:
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


def whole_tile_stores(loops: Sequence[int], passes: int) -> int:
    """Those of :func:`loop_stores` in loops without a mask: all, or every second one.

    Args:
        loops: what it found.
        passes: how often the code goes over its tiles; with a temperature below 1 once more, for the maximum.
    """
    return sum(loops[:: max(1, len(loops) // passes)])


def of_nvidia(image: bytes) -> dict[str, Any]:
    """Of a cubin: some fields of :class:`gim_kernels.aot.compiled.Compiled`, by name."""
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
        "loop_stores": loop_stores(code),
        "matrix": dict(sorted(matrix.items())),
        "exponentials": len(re.findall(r"\bMUFU\.EX2\b", code)),
    }


def of_amd(assembly: str) -> dict[str, Any]:
    """Of AMD's assembly: the same fields."""

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
