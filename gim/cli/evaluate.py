"""`gim evaluate`."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.errors import UserError, check_outputs, check_parquet, handled, refused
from gim.cli.models import load
from gim.cli.options import Debug, DeviceName, Dtype, DtypeOption, Trust
from gim.cli.output import deliver
from gim.cli.progress import counting

if TYPE_CHECKING:
    from gim.evaluation.result import Evaluation


class ProtocolName(StrEnum):
    """How values are averaged."""

    AOPC = "aopc"
    PAPER = "paper"


class GridChoice(StrEnum):
    """How many numbers of tokens are replaced."""

    FULL = "full"
    COARSE = "coarse"


class ForwardDtype(StrEnum):
    """The type of forwards of masked inputs."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


def command(
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id or folder of a causal language model.")],
    data: Annotated[str, typer.Argument(help="A task (see gim tasks), or a file .jsonl or .parquet.")],
    methods: Annotated[
        str, typer.Option(help="Names with commas: presets, gradient_x_input, IG:50, occlusion, LIME, random, ...")
    ] = "GIM,ATTNLRP,IG:50,occlusion,random",
    measures: Annotated[
        str, typer.Option(help="Names with commas: logprob, logit, logodds, contrast.")
    ] = "logprob,logit",
    protocol: Annotated[ProtocolName, typer.Option(help="How it is averaged.")] = ProtocolName.AOPC,
    grid: Annotated[GridChoice, typer.Option(help="How many numbers of tokens are replaced.")] = GridChoice.FULL,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples, at most; by default all, and 100 of a task.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The method that the others are compared with; the first by default.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The token that stands for nothing.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one forward, at most.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Keep finished examples here, and go on from those that are here.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write every value here, as Parquet.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page here.")] = None,
    device: DeviceName = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    forward_dtype: Annotated[
        ForwardDtype | None, typer.Option(help="Type of the forwards of masked inputs, in a copy of the model.")
    ] = None,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure how faithful attributions are: replace the tokens they point at, and see what the model still says.

    Methods are compared example by example, with 95 % bootstrap intervals. Ctrl-C shows what is finished, and with
    --resume the same command goes on from there.
    """
    with handled(debug):
        check_parquet("--save", save)
        outputs = check_outputs({"--save": save, "--html": html}, [("data", data), ("--resume", resume)])
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if reference is not None and reference not in names:
            raise UserError(f"--reference must be one of {', '.join(names)}, got {reference!r}")
        loaded, tokenizer = load(model, device, dtype, trust_remote_code)
        settings: dict[str, Any] = {
            "methods": names,
            "measures": [name.strip() for name in measures.split(",") if name.strip()],
            "protocol": protocol.value,
            "grid": grid.value,
            "baseline": baseline,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "limit": limit,
            "resume": resume,
        }
        found, finished = _evaluated(loaded, tokenizer, data, settings, forward_dtype and forward_dtype.value)
        against = reference or names[0]
        writers = {"--save": found.save, "--html": lambda path: found.to_html(path, reference=against)}
        try:
            deliver(outputs, writers, lambda: _show(found, against))
        except ZeroDivisionError as error:  # a ratio to a logit of 0, of which the library says what to do
            raise UserError(str(error)) from error
    if not finished:
        raise typer.Exit(130)


def _evaluated(
    model: Any, tokenizer: Any, data: str, settings: dict[str, Any], forward_dtype: str | None
) -> tuple[Evaluation, bool]:
    """The evaluation, and whether it came to its end."""
    import torch

    import gim

    chosen = None if forward_dtype is None else getattr(torch, forward_dtype)
    with refused(), counting("examples") as progress:
        try:
            return gim.evaluate(model, tokenizer, data, progress=progress, forward_dtype=chosen, **settings), True
        except gim.EvaluationInterrupted as error:
            if error.evaluation is None:
                raise
            return error.evaluation, False
        except (OSError, ImportError, TypeError) as error:
            raise UserError(str(error)) from error


def _show(found: Evaluation, reference: str) -> None:
    """A table for each measure and metric."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gim.evaluation.measures import HIGHER_IS_BETTER

    console = Console()
    console.print(
        Text(
            f"{len(found)} examples, {found.dropped} more dropped, which the model had wrong; "
            f"protocol {found.settings['protocol']}, grid {found.settings['grid']}, seed {found.settings['seed']}",
            "dim",
        ),
        soft_wrap=True,
    )
    for (measure, metric), rows in found.table(reference).groupby(["measure", "metric"], sort=False):
        better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
        table = Table(title=f"{metric} in {measure} ({better} is better)", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("method", "mean", "95 %", f"minus {reference}", "95 %"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows.itertuples():
            gap = (_number(row.difference), _range(row.difference_low, row.difference_high))
            table.add_row(
                row.method,
                _number(row.mean),
                _range(row.low, row.high),
                *(("", "") if row.method == reference else gap),
            )
        console.print(table)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _range(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"
