"""Hold the kernels of the headline against the reference on this device: ``python -m benchmarks.verify --table FILE``.

What is right is written as rows of gim_kernels/triton/verified.json, variant by variant; copied there, the first use of
those variants on such a device needs no check.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gim_kernels.aot import variants
from gim_kernels.triton import selfcheck, tiles, verified
from gim_kernels.triton.selfcheck import KernelError


def main(
    table: Annotated[Path, typer.Option(help="Where to write the rows, as they come.")],
    budget: Annotated[float, typer.Option(help="No further variant after this many seconds.")] = 20.0,
    tiny: Annotated[bool, typer.Option(help="Two variants: in triton's interpreter on a CPU.")] = False,
) -> None:
    """The variants of bfloat16 that most models run, those with causality alone first."""
    begin, console = time.monotonic(), Console()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    index = -1 if device.index is None else device.index
    architecture = tiles.architecture_of(torch.empty(0, device=device))
    sizes, dtype = ((16,), "fp16") if tiny else ((128, 64), "bf16")
    entries = [*variants.norms(dtype), *variants.gated_products(dtype)]
    for size in sizes:
        entries += variants.attention(architecture, size, dtype)
    entries.sort(key=lambda entry: ("/plain" not in entry.key, "attention" not in entry.key))
    right: list[str] = []
    wrong = 0
    table.write_text("[]\n")
    for variant in {entry.variant.name: entry.variant for entry in (entries[:2] if tiny else entries)}.values():
        if time.monotonic() - begin > budget:
            break
        try:
            selfcheck.check(variant, device)
        except KernelError as error:
            wrong += 1
            console.print(f"[bold red]wrong:[/] {error}", soft_wrap=True, highlight=False)
        else:
            right.append(variant.name)
            table.write_text(json.dumps([verified.entry(index, right)], indent=1) + "\n")
    console.print(f"{len(right)} variants are right on {verified.device_name(index)}, {wrong} wrong")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
