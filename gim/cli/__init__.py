"""The command line: one file a command, and beside them what they share.

Nothing heavy is imported before a command runs, so that `gim --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from gim.cli import bench, check, circuit, demo, evaluate, explain, plan, show, tasks

app = typer.Typer(
    name="gim",
    help="Gradient attribution of large language models with the GIM rules.",
    no_args_is_help=True,
    add_completion=False,
    # Boxes around help take as long to load as all else that help needs.
    rich_markup_mode=None,
    # A traceback of an unexpected error is for whoever mends it: Python's own, without the values in it.
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    import importlib.metadata

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


app.command("explain", short_help="Attribute what a model says next to the tokens of its prompt.")(explain.command)
app.command("show", short_help="Show attributions that were written as JSON.")(show.command)
app.command("check", short_help="Show what each rule is applied to, operator by operator.")(check.command)
app.command("plan", short_help="Predict the memory of an attribution under every plan.")(plan.command)
app.command("demo", short_help="Ask a small model that comes along, and see where it looked.")(demo.command)
app.command(
    "bench",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    short_help="Measure throughput and memory against rivals (source tree).",
)(bench.command)
app.command("evaluate", short_help="Measure how faithful attributions are, with intervals.")(evaluate.command)
app.command("tasks", short_help="List the tasks that gim evaluate has in the box, or show one.")(tasks.command)
app.add_typer(circuit.app, name="circuit")
