"""What the machine is, and one microbenchmark: ``python -m benchmarks.probe --json FILE``.

The tiles of gim_kernels/triton/tiles.py rest on a model in which a product of two matrices in shared memory with 32
columns waits for that memory, and one with 64 does not. Here both run alone, on tiles that never leave the chip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import triton.language as tl
import typer
from rich.console import Console

from benchmarks.measure import Stopwatch, clocks, environment
from benchmarks.results import SCHEMA, save

#: Rows, and inner size, of the products; programs for each multiprocessor.
ROWS, INNER, PROGRAMS = 64, 128, 2


@triton.jit
def products_kernel(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    out_ptr,
    repeats,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """``out = repeats * left @ right^T``, ``[ROWS, COLUMNS]`` from ``[ROWS, INNER]`` and ``[COLUMNS, INNER]``."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    left = tl.load(left_ptr + row * INNER + inner[None, :])
    right = tl.load(right_ptr + column[:, None] * INNER + inner[None, :])
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(repeats):
        out = tl.dot(left, tl.trans(right), out)
    tl.store(out_ptr + row * COLUMNS + column[None, :], out)


def rate(columns: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Floating-point operations per second of products with that many columns, and whether their sum is right."""
    left = torch.ones(ROWS, INNER, dtype=torch.float16, device=device)
    right = torch.ones(columns, INNER, dtype=torch.float16, device=device)
    out = torch.empty(ROWS, columns, dtype=torch.float32, device=device)
    programs = PROGRAMS
    if device.type == "cuda":
        programs *= torch.cuda.get_device_properties(device).multi_processor_count

    def run() -> None:
        products_kernel[(programs,)](left, right, out, repeats, ROWS, columns, INNER, num_warps=4)

    run()
    watch = Stopwatch(device)
    seconds = min(watch(run) for _ in range(5))
    right_sum = bool((out == repeats * INNER).all())
    tflops = 2 * ROWS * columns * INNER * repeats * programs / seconds / 1e12
    return {"columns": columns, "tflops": round(tflops, 6), "right": right_sum}


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write what was found, as it comes.")],
    tiny: Annotated[bool, typer.Option(help="Few products: in triton's interpreter on a CPU.")] = False,
) -> None:
    """Versions and clocks, then the rate of products with 32 and with 64 columns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"schema": SCHEMA, "suite": "probe", **environment(device), "complete": False, "rows": []}
    found["clocks"] = clocks(device)
    save(json_file, found)
    for columns in (32, 64, 128):
        found["rows"].append(rate(columns, 4 if tiny else 20000, device))
        save(json_file, found)
        Console().print(found["rows"][-1])
    found["complete"] = True
    save(json_file, found)


if __name__ == "__main__":
    typer.run(main)
