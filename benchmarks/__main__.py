"""The program behind ``gim bench``: ``python -m benchmarks SUITE``.

It is no part of the package ``gim``: nothing is timed before it agrees with the tests' oracle, and a package does not
ship its tests. ``gim bench`` starts it from the source tree.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import results as files
from benchmarks.outside import Outside
from benchmarks.results import ResultsError
from benchmarks.runner import SETTINGS, BenchmarkError, Settings, Suite, cases_of, device_of, new_results

app = typer.Typer(
    name="gim bench",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Throughput and memory of gim-kernels and its rivals, each held against float64 before it is timed.",
)

_Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write results here, case by case: a file, or a folder for a file named by the run."),
]
_Plot = Annotated[Path | None, typer.Option("--plot", help="Write a PNG of time and memory over length here.")]


@contextmanager
def _handled() -> Iterator[None]:
    """Inside, what the user can put right becomes one line and exit code 2."""
    try:
        yield
    except (BenchmarkError, ResultsError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error


def _json_file(path: Path | None, results: files.Results) -> Path | None:
    """The file to write, known to be writable before anything is measured."""
    from gim.files import check_writable

    if path is None:
        return None
    if path.is_dir() or path.suffix != ".json":
        path.mkdir(parents=True, exist_ok=True)
        path = path / files.default_name(results)
    try:
        check_writable(path, "--json")
    except OSError as error:
        raise BenchmarkError(str(error)) from error
    return path


def _check_plot(path: Path | None) -> None:
    from gim.files import check_writable

    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("--plot: a picture needs matplotlib: pip install gim-kernels[report]")
    try:
        check_writable(path, "--plot")
    except OSError as error:
        raise BenchmarkError(str(error)) from error


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(",") if one)
    except ValueError as error:
        raise BenchmarkError(f"--tokens: want lengths such as 1024,4096, got {text!r}") from error


def run_suite(suite: Suite, json: Path | None, plot: Path | None, console: Console) -> int:
    """Run a suite, show each case when it is done, and keep what there is when it is interrupted.

    Returns:
        The exit code: 0; 1 where a system of ours was wrong; 130 where the run was interrupted.
    """
    import transformers

    from benchmarks import report

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    target = _json_file(json, suite.results)
    interrupted = False
    console.print(f"[dim]{escape(report.headline(suite.results))}[/]", soft_wrap=True)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("measuring the machine", total=len(suite.cases))
        try:
            for index, (_, rows) in enumerate(suite.run(lambda case: bars.update(task, description=case.name))):
                if index == 0:
                    console.print(f"[dim]{escape(report.roofline_line(suite.results))}[/]", soft_wrap=True)
                    busy = report.busy(suite.results)
                    if busy:
                        console.print(f"[yellow]{busy}[/]", soft_wrap=True)
                console.print(report.case_table(rows))
                if target is not None:
                    files.save(target, files.merged(target, suite.results))
                bars.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    rows = suite.results["rows"]
    growth = report.growth_table(rows)
    if growth is not None:
        console.print(growth)
    if target is not None:
        files.save(target, files.merged(target, suite.results))
        console.print(f"[dim]wrote[/] {escape(str(target))}", soft_wrap=True)
    if plot is not None and any("median_ms" in row for row in rows):
        report.plot(suite.results, plot)
        console.print(f"[dim]wrote[/] {escape(str(plot))}", soft_wrap=True)
    if interrupted:
        measured = len({row["case"] for row in rows})
        console.print(f"[yellow]interrupted:[/] {measured} of {len(suite.cases)} cases were measured and are kept")
        return 130
    missed = suite.results.get("not_reached", [])
    if missed:
        console.print(f"[yellow]not reached[/] in {suite.settings.budget_seconds:.0f} s: {len(missed)} cases")
    wrong = [row for row in rows if row["system"].startswith("gim-kernels") and row.get("note", "").startswith("wrong")]
    return 1 if wrong else 0


@app.command()
def run(
    suite: Annotated[
        str, typer.Argument(help="quick, attention, pointwise, explain, memory, headline, explain-8b or long.")
    ],
    json: _Json = None,
    plot: _Plot = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    tokens: Annotated[str, typer.Option(help="Only these lengths, such as 1024,4096.")] = "",
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of every system at most.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="No further round of a case after this long.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="No further case after this many seconds.")] = None,
    outside: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with gim-explain, and TransformerLens: three rivals of explain."),
    ] = None,
) -> None:
    """Run a suite: every system of every case, interleaved."""
    with _handled():
        where = device_of(device)
        chosen = cases_of(suite, where, only, _lengths(tokens))
        settings = SETTINGS.get(suite, Settings())
        given: dict[str, Any] = {"repeats": repeats, "case_seconds": seconds, "budget_seconds": budget}
        settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
        settings = dataclasses.replace(settings, least=min(settings.least, settings.repeats))
        _check_plot(plot)
        rivals = None if outside is None else Outside(outside)
        code = run_suite(Suite(suite, where, chosen, settings, rivals), json, plot, Console())
    raise typer.Exit(code)


@app.command()
def cases(
    suite: Annotated[str, typer.Argument(help="Name of a suite.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """List the cases of a suite with their work, without running them."""
    with _handled():
        chosen = cases_of(suite, device_of(device))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case")
    for column in ("GFLOP", "MB moved at least", "GiB held at least"):
        table.add_column(column, justify="right")
    for case in chosen:
        held = case.tensor_bytes() / 2**30
        table.add_row(case.name, f"{case.flops() / 1e9:,.1f}", f"{case.bytes() / 1e6:,.1f}", f"{held:,.2f}")
    Console().print(table)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A results file.")],
    new: Annotated[Path, typer.Argument(help="A results file of the same suite on the same device.")],
    fail_above: Annotated[
        float | None, typer.Option(help="Exit with 1 where one of our systems takes this many times as long.")
    ] = None,
) -> None:
    """Show what became faster or slower; results of different devices are refused."""
    with _handled():
        rows = files.compare(files.load(old), files.load(new))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("case", "system"):
        table.add_column(column, overflow="fold")
    for column in ("old ms", "new ms", "time", "memory"):
        table.add_column(column, justify="right")
    table.add_column("")
    slow = False
    for row in rows:
        memory = row["memory_ratio"]
        ours = row["system"].startswith("gim-kernels")
        slow |= fail_above is not None and ours and row["time_ratio"] > fail_above
        table.add_row(
            row["case"],
            row["system"],
            f"{row['old_ms']:,.3f}",
            f"{row['new_ms']:,.3f}",
            f"{row['time_ratio']:.2f}x",
            "" if memory is None else f"{memory:.2f}x",
            "" if row["beyond_spread"] else "within spread",
        )
    Console().print(table)
    raise typer.Exit(1 if slow else 0)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A results file.")],
    plot: _Plot = None,
) -> None:
    """Show a results file again."""
    from benchmarks import report

    with _handled():
        found = files.load(file)
        _check_plot(plot)
        console = Console()
        console.print(f"[dim]{escape(report.headline(found))}[/]", soft_wrap=True)
        console.print(f"[dim]{escape(report.roofline_line(found))}[/]", soft_wrap=True)
        for case in dict.fromkeys(row.get("case", "") for row in found["rows"]):
            own = [row for row in found["rows"] if row.get("case", "") == case]
            console.print(report.case_table(own))
        growth = report.growth_table(found["rows"])
        if growth is not None:
            console.print(growth)
        if plot is not None:
            report.plot(found, plot)


@app.command()
def statements(
    json: _Json = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts for each preset.")] = 50,
) -> None:
    """Count how often each preset finds both statements of the asked fact in the demo model's prompts."""
    import torch

    import gim.demo
    from benchmarks import statements as counted
    from gim.rules import PRESETS

    found = new_results("statements", torch.device("cpu"))
    with _handled():
        target = _json_file(json, found)
    model, tokenizer = gim.demo.load()
    for rules in PRESETS:
        row = {"rules": rules, **counted.count(model, tokenizer, rules, prompts)}
        found["rows"].append(row)
        Console().print(f"{rules}: {row['found']} of {row['prompts']}, answered {row['answered']}")
        if target is not None:
            files.save(target, found)
    found["complete"] = True
    if target is not None:
        files.save(target, found)


def main(arguments: list[str]) -> None:
    """Run a command; the name of a suite alone runs that suite."""
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        arguments = ["run", *arguments]
    app(arguments, prog_name="gim bench")


if __name__ == "__main__":
    main(sys.argv[1:])
