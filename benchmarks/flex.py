"""Compile FlexAttention for the headline, once for each head size, into torch's cache: ``python -m benchmarks.flex``.

It takes up to a minute each, on the host alone, and so is done while other steps run; the headline then finds it there.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.cases import SUITES, AttentionCase
from benchmarks.systems import SYSTEMS


def main(
    tiny: Annotated[bool, typer.Option(help="The shortest case, on a CPU, by torch's eager backend.")] = False,
) -> None:
    """Run FlexAttention's step once for each head size."""
    device = torch.device("cpu" if tiny else "cuda")
    (flex,) = (system for system in SYSTEMS["attention"] if system.name.startswith("FlexAttention"))
    done: set[int] = set()
    for case in SUITES["headline"]["cpu" if tiny else "cuda"]:
        if not isinstance(case, AttentionCase) or case.head_size in done or not (tiny or flex.where(case)):
            continue
        done.add(case.head_size)
        if tiny:  # there is no backward on a CPU
            case = dataclasses.replace(case, part="forward")
        with torch.compiler.set_stance("force_eager" if tiny else "default"):
            flex.prepare(case, case.inputs(device), device)()
        Console().print(f"compiled for {case.name}")


if __name__ == "__main__":
    typer.run(main)
