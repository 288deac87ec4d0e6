"""`gim circuit find | score | export | show`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.errors import UserError, check_outputs, check_parquet, handled, refused
from gim.cli.models import load, rules_named
from gim.cli.options import Debug, DeviceName, Dtype, DtypeOption, MemoryOption, RulesName, Trust
from gim.cli.output import deliver
from gim.cli.progress import counting

if TYPE_CHECKING:
    from gim.circuits import Circuit, Curve

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Find, score and show circuits: which writer speaks to which reader.",
)


class LevelName(StrEnum):
    """What is scored."""

    EDGE = "edge"
    NODE = "node"


class MetricName(StrEnum):
    """What a model is asked for on a pair."""

    LOGIT_DIFFERENCE = "logit_difference"
    PROBABILITY_DIFFERENCE = "probability_difference"


ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id or folder of a causal language model.")]
Data = Annotated[
    str,
    typer.Argument(
        help="A task with pairs (indirect-objects, greater-than, agreement), a file .jsonl, .csv or .parquet."
    ),
]
CircuitFile = Annotated[Path, typer.Argument(help="A circuit: .parquet of gim circuit find, .json or .pt of EAP-IG.")]
MetricOption = Annotated[MetricName, typer.Option(help="What the model is asked for on a pair.")]
BatchTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of one batch of pairs, at most.")]
Seed = Annotated[int, typer.Option(min=0, help="Of a task's pairs.")]
Resume = Annotated[Path | None, typer.Option(help="Keep finished pairs here, and go on from those that are here.")]
Absolute = Annotated[bool, typer.Option("--absolute", help="Take the strongest whatever their sign.")]


#: What is exported in no part.
WHOLE = (".parquet", ".html")


@app.command("find")
def find(
    data: Data,
    model: ModelOption,
    save: Annotated[Path, typer.Option(help="Write every score here, as Parquet.")],
    rules: RulesName = "GIM",
    level: Annotated[LevelName, typer.Option(help="Score edges, or nodes.")] = LevelName.EDGE,
    ig_steps: Annotated[int | None, typer.Option(min=1, help="Points of EAP-IG; none for edge attribution.")] = None,
    metric: MetricOption = MetricName.LOGIT_DIFFERENCE,
    grouped: Annotated[bool, typer.Option("--grouped", help="Count k and v for each key head.")] = False,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs, at most; by default all, and 100 of a task.")] = None,
    batch_tokens: BatchTokens = None,
    memory: MemoryOption = "none",
    seed: Seed = 0,
    resume: Resume = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of the strongest paths here.")] = None,
    device: DeviceName = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Score every edge of a model on pairs of prompts. Ctrl-C keeps what is finished."""
    with handled(debug):
        if html is not None and level is LevelName.NODE:
            raise UserError("--html: paths need --level edge")
        check_parquet("--save", save)
        outputs = check_outputs({"--save": save, "--html": html}, [("data", data), ("--resume", resume)])
        chosen = rules_named(rules, None)
        loaded, tokenizer = load(model, device, dtype, trust_remote_code)
        from gim import circuits

        finished = True
        with _asked(), counting("pairs") as progress:
            try:
                found = circuits.attribute(
                    loaded, data, tokenizer=tokenizer, rules=chosen, level=level.value, ig_steps=ig_steps,
                    batch_tokens=batch_tokens, progress=progress, metric=metric.value, grouped=grouped,
                    memory=memory, resume=resume, limit=pairs, seed=seed,
                )  # fmt: skip
            except circuits.CircuitInterrupted as error:
                if error.circuit is None:
                    raise
                found, finished = error.circuit, False
        writers: dict[str, Callable[[Path], object]] = {"--save": found.save, "--html": found.to_html}
        _deliver(outputs, writers, lambda: _show(found, 10, absolute=True))
    if not finished:
        raise typer.Exit(130)


@app.command("score")
def score(
    circuit: CircuitFile,
    data: Data,
    model: ModelOption,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs, at most; by default all, and 100 of a task.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Pairs left out first: those the circuit was found on.")] = 0,
    metric: MetricOption = MetricName.LOGIT_DIFFERENCE,
    batch_tokens: BatchTokens = None,
    seed: Seed = 0,
    resume: Resume = None,
    save: Annotated[Path | None, typer.Option(help="Write the metric of every pair and size here, as JSON.")] = None,
    device: DeviceName = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure how faithful a circuit is at MIB's sizes, by patching edges: the curve, CPR and CMD.

    Ctrl-C keeps what is finished.
    """
    with handled(debug):
        read: list[tuple[str, str | Path | None]] = [("circuit", circuit), ("data", data), ("--resume", resume)]
        outputs = check_outputs({"--save": save}, read)
        found = _loaded(circuit)
        loaded, tokenizer = load(model, device, dtype, trust_remote_code)
        from gim.circuits import CurveInterrupted

        finished = True
        with _asked(), counting("pairs") as progress:
            try:
                curve = found.faithfulness(
                    data, model=loaded, tokenizer=tokenizer, metric=metric.value, batch_tokens=batch_tokens,
                    progress=progress, resume=resume, limit=pairs, skip=skip, seed=seed,
                )  # fmt: skip
            except CurveInterrupted as error:
                if error.curve is None:
                    raise
                curve, finished = error.curve, False
        _deliver(outputs, {"--save": lambda path: _save_curve(curve, path)}, lambda: _show_curve(curve))
    if not finished:
        raise typer.Exit(130)


@app.command("export")
def export(
    circuit: CircuitFile,
    to: Annotated[
        Path,
        typer.Argument(help=".json or .pt of EAP-IG and MIB, .parquet, .graphml, or .html of the strongest paths."),
    ],
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Edges of the circuit before pruning; all by default.")
    ] = None,
    absolute: Absolute = False,
    debug: Debug = False,
) -> None:
    """Write a circuit in another format, told by the ending."""
    with handled(debug):
        check_outputs({"to": to}, [("circuit", circuit)])
        if absolute and n is None:
            raise UserError("--absolute says which edges -n takes: give -n too")
        if n is not None and to.suffix in WHOLE:
            raise UserError(f"-n is not for {' and '.join(WHOLE)}, which have every score, or the strongest paths")
        found = _loaded(circuit)

        def graphml(path: Path) -> None:
            import io

            import networkx

            from gim.files import write_atomically

            out = io.BytesIO()
            networkx.write_graphml(found.to_networkx(n, absolute=absolute), out)
            write_atomically(path, out.getvalue())

        writers: dict[str, Callable[[Path], object]] = {
            ".json": lambda path: found.to_mib(path, n, absolute=absolute),
            ".pt": lambda path: found.to_mib(path, n, absolute=absolute),
            ".parquet": found.save,
            ".graphml": graphml,
            ".html": found.to_html,
        }
        if to.suffix not in writers:
            raise UserError(f"to: must end in {', '.join(writers)}, got {to}")
        _deliver({"to": to}, {"to": writers[to.suffix]}, lambda: None)


@app.command("show")
def show(
    circuit: CircuitFile,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="How many of the strongest to list.")] = 20,
    absolute: Absolute = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with a picture of the strongest paths here.")] = None,
    paths: Annotated[int, typer.Option(min=1, help="Paths on the page, at most.")] = 12,
    debug: Debug = False,
) -> None:
    """List a circuit's strongest edges, or nodes, and what it was found on; draw its strongest paths."""
    with handled(debug):
        outputs = check_outputs({"--html": html}, [("circuit", circuit)])
        found = _loaded(circuit)
        writers = {"--html": lambda path: found.to_html(path, paths=paths)}
        _deliver(outputs, writers, lambda: _show(found, top, absolute=absolute))


@contextmanager
def _asked() -> Iterator[None]:
    """Inside, what the library refuses of files, packages and arguments is the user's to put right too."""
    with refused():
        try:
            yield
        except (OSError, ImportError, TypeError) as error:
            raise UserError(str(error)) from error


def _loaded(path: Path) -> Circuit:
    from gim.circuits import Circuit

    with _asked():
        return Circuit.load(path)


def _deliver(
    outputs: Mapping[str, Path], writers: Mapping[str, Callable[[Path], object]], show: Callable[[], object]
) -> None:
    """As :func:`deliver`; what no file can hold of a circuit is the user's to put right too."""
    deliver(outputs, {name: _asked()(writer) for name, writer in writers.items()}, show)


def _save_curve(curve: Curve, path: Path) -> None:
    import json

    from gim.files import write_atomically

    write_atomically(path, json.dumps(curve.to_dict()).encode())


def _show(found: Circuit, top: int, *, absolute: bool) -> None:
    """The strongest edges or nodes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gim.report.text import visible

    console = Console()
    console.print(Text(visible(repr(found)), "dim"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("writer", no_wrap=True)
    if found.level == "edge":
        table.add_column("reader", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    count = min(top, found.count)
    rows: Any = found.top(count, absolute) if found.level == "edge" else found.top_nodes(count, absolute)
    for *names, value in rows:
        table.add_row(*names, f"{value:+.4g}")
    console.print(table)


def _show_curve(curve: Curve) -> None:
    """The curve in both orders, and the two areas."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    areas = (("signed", curve.cpr, "CPR", "higher"), ("absolute", curve.cmd, "CMD", "lower"))
    for order, area, name, better in areas:
        table = Table(title=f"edges by {order} score", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("size", "edges", "of the metric kept", "95 %"):
            table.add_column(column, justify="right", no_wrap=True)
        for point in curve.points:
            if point.order == order:
                kept = point.faithfulness
                cells = (f"{point.edges:,}", f"{kept.mean:.3f}", _range(kept.low, kept.high))
                table.add_row(f"{100 * point.size:g} %", *cells)
        console.print(table)
        spread = _range(area.low, area.high)
        console.print(f"{name} {area.mean:.3f}{f' ({spread})' if spread else ''}, {better} is better")
    shown = f"{curve.cpr.n} pairs; metric {curve.clean:.3f} clean, {curve.corrupted:.3f} corrupted"
    console.print(Text(shown, "dim"))


def _range(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
