"""The command line: ``build``, ``report`` and ``list``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gim_kernels.aot
from gim_kernels.aot.compiled import Selection, compile_all
from gim_kernels.aot.library import build
from gim_kernels.aot.report import write_report
from gim_kernels.aot.variants import DTYPES, HEAD_SIZES, TARGETS, shipped


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gim_kernels.aot", description=(gim_kernels.aot.__doc__ or "").split("\n")[0]
    )
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
