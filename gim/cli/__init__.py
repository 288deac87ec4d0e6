"""The command line: one file a command, and beside them what they share.

Nothing heavy is imported before a command runs, so that `gim --help` answers at once.
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from gim.cli import bench, check, circuit, demo, evaluate, explain, plan, tasks

app = typer.Typer(
    name="gim",
    help="Gradient attribution of large language models with the GIM rules.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of an unexpected error is for whoever mends it: Python's own, without the values in it.
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = importlib.metadata.version("gim-kernels")
    except importlib.metadata.PackageNotFoundError:
        version = "of a source tree that is not installed"
    typer.echo(f"gim-kernels {version}")
    raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("explain")(explain.command)
app.command("check")(check.command)
app.command("plan")(plan.command)
app.command("demo")(demo.command)
app.command(
    "bench",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    short_help="Measure throughput and memory against rivals; needs a source tree.",
)(bench.command)
app.command("evaluate")(evaluate.command)
app.command("tasks")(tasks.command)
app.add_typer(circuit.app, name="circuit")
