"""`gim plan`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.errors import UserError, handled
from gim.cli.models import loading, quieten, rules_named, twin_of
from gim.cli.options import Debug, Dtype, DtypeOption, RulesName, Trust
from gim.cli.output import showing

if TYPE_CHECKING:
    from gim.memory import PlanRow


def command(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a causal language model; its config is enough.")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Length of the prompt.")],
    gpu_memory: Annotated[
        str | None,
        typer.Option(help="Memory of the GPU, such as 80GiB; by default that of the device that is there."),
    ] = None,
    explained: Annotated[int, typer.Option(min=1, help="How many positions are explained.")] = 1,
    rules: RulesName = "GIM",
    dtype: DtypeOption = Dtype.AUTO,
    trust_remote_code: Trust = False,
    debug: Debug = False,
) -> None:
    """Predict the memory of an attribution under every plan, before anything is loaded.

    Exits with 1 where no plan fits.
    """
    with handled(debug):
        chosen = rules_named(rules, None)
        if explained > tokens:
            raise UserError(f"--explained must be at most the {tokens} tokens, got {explained}")
        memory = None if gpu_memory is None else _bytes(gpu_memory)
        with loading(f"the config of {model}"):
            import torch

            from gim.estimate import LONGEST
            from gim.memory import free_bytes, plan_rows

            if tokens > LONGEST:
                raise UserError(f"--tokens must be at most {LONGEST:,}, got {tokens:,}")
            quieten()
            device = torch.device("cuda" if memory is not None or torch.cuda.is_available() else "cpu")
            twin = twin_of(model, chosen, device, dtype, trust_remote_code)
        total = free_bytes(device) if memory is None else memory
        rows = plan_rows(twin, tokens, total, explained=explained)
        with showing():
            _show_plans(type(twin.model).__name__, twin, tokens, total, gpu_memory is not None, rows)
    if not any(row.chosen for row in rows):
        raise typer.Exit(1)


def _bytes(text: str) -> int:
    """Bytes from text such as 80GiB, 80GB, 512 MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    count = 0.0
    if found is not None:
        count = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
    if count < 1:
        raise UserError(f"--gpu-memory must be a size such as 80GiB or 80GB, got {text!r}")
    return int(count)


def _show_plans(model: str, twin: Any, tokens: int, memory: int | None, is_given: bool, rows: list[PlanRow]) -> None:
    """Every plan's predicted memory and cost, the one that `auto` would take marked."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gim.memory import AUTO_SHARE, size
    from gim.parts import anatomy
    from gim.report.text import visible

    console = Console()
    where = "GPU" if twin.device == "cuda" else "CPU"
    has = "unknown" if memory is None else f"{size(memory)} {'given' if is_given else 'free'}"
    console.print(Text.assemble((visible(model), "bold"), f", {tokens:,} tokens on a {where}: memory {has}"))
    console.print(Text.assemble(("weights ", "dim"), size(twin.weights), ("; predicted, not measured", "dim")))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # By part only where there is room for it.
    parts = ("checkpoints", "attention", "layer") if console.width >= 120 else ()
    table.add_column("", min_width=1)
    table.add_column("plan", overflow="fold")
    for column in ("memory", *parts, "host", "cost", "longest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        found = row.estimate
        mark = Text("*", "bold green") if row.chosen else Text("")
        if found is None:
            continue
        style = "bold" if row.chosen else "" if row.fits else "dim"
        table.add_row(
            mark,
            Text(row.plan.name, style),
            Text(size(found.peak), style if row.fits else "red"),
            *(size(found.parts[part]) for part in parts),
            size(found.host) if found.host else "",
            f"{found.relative_cost:.2f}x",
            "" if row.longest is None else f"{row.longest:,}",
        )
    console.print(table)
    reasons: dict[str, list[str]] = {}  # which are too long for a column
    for row in rows:
        if row.estimate is None:
            reasons.setdefault(row.reason.removeprefix(f"memory={row.plan.name!r} "), []).append(row.plan.name)
    for reason, names in reasons.items():
        console.print(Text.assemble((f"{', '.join(names)}: ", "bold"), (visible(reason), "dim")))
    if any(row.chosen for row in rows):
        console.print(
            Text.assemble(("*", "bold green"), (" the fastest plan that fits: --memory auto takes it", "dim"))
        )
    else:
        console.print(Text("no plan fits", "bold red"))
    console.print(
        Text(
            "cost: operations of matrix products and attention, over those of the plan none. longest: the prompt, "
            f"in tokens, that fits in the weights and {AUTO_SHARE:.0%} of the rest",
            "dim",
        )
    )
    limit = anatomy.of(twin.model).position_limit
    if limit is not None and tokens > limit:
        console.print(Text(f"the model has {limit:,} positions: more needs --allow-extrapolation", "yellow"))
