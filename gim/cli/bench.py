"""`gim bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

from gim.cli.errors import UserError, handled

#: Runs the benchmarks of the source tree named first, before everything else that Python can import.
_BENCH = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('benchmarks', run_name='__main__')"


def command(context: typer.Context) -> None:
    """Run the benchmarks of the source tree that this package, or the current folder, belongs to.

    They are no part of the package: nothing is timed before the tests' oracle has held it against float64, and the
    rivals are written in the tests' words. They run in a process of their own, with the code of their own tree, so that
    the commit in the results is the one that was timed.
    """
    with handled(False):
        places = (Path(__file__).parents[2], Path.cwd())
        parts = ("benchmarks/__main__.py", "tests/oracle.py", "gim_kernels/__init__.py")
        tree = next((place for place in places if all((place / part).is_file() for part in parts)), None)
        if tree is None:
            raise UserError(
                "benchmarks run from a source tree of gim-kernels, where the oracle is that they hold everything to: "
                "go to a checkout's folder and run gim bench there"
            )
    command = [sys.executable, "-c", _BENCH, str(tree), *context.args]
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        code = 130  # the other process was interrupted too, and has kept what it had
    raise typer.Exit(code)
