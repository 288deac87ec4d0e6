"""`gim check`."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.errors import UserError, handled, refused
from gim.cli.models import load, refuse_engine, rules_named
from gim.cli.options import Debug, DeviceName, Dtype, DtypeOption, EngineName, EngineOption, RulesName, Trust
from gim.cli.output import showing

if TYPE_CHECKING:
    from gim.applied import AppliedReport
    from gim.rules import Rules

#: What a model reads in `gim check`, where no other text is given.
CHECK_PROMPT = "The capital of France is"
#: How often `gim check --engine` runs each of the two engines.
COMPARED_TIMES = 5


def command(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a language model or sequence classifier.")],
    rules: RulesName = "GIM",
    device: DeviceName = "cpu",
    dtype: DtypeOption = Dtype.AUTO,
    trust_remote_code: Trust = False,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the model reads while every operator is watched.")
    ] = CHECK_PROMPT,
    debug: Debug = False,
    engine: EngineOption = EngineName.AUTO,
) -> None:
    """Show what each rule is applied to in one forward pass, watched operator by operator.

    With --engine, the prompt is explained under that engine and under auto, and the two are shown side by side.
    Exits with 1 where a rule cannot be applied to a part that it is meant for.
    """
    with handled(debug):
        chosen = rules_named(rules, None)
        loaded, tokenizer = load(model, device, dtype, trust_remote_code)
        refuse_engine(engine, loaded)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(loaded.device)
        if not ids.numel():
            raise UserError("--prompt: holds no token")
        with refused():
            from gim.context import inspect

            report = inspect(loaded, chosen, ids, engine=engine.value)
            compared = [] if engine is EngineName.AUTO else _compare(loaded, ids, chosen, engine)
        with showing():
            _show_report(type(loaded).__name__, chosen, report, prompt)
            _show_compared(compared)
            _show_kernels(loaded.device)
    if not report.complete:
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class _Compared:
    """One engine's attribution of a prompt: what ran, the seconds it took, how far it is off that of ``auto``."""

    asked: str
    ran: str
    seconds: float
    difference: float


def _compare(model: Any, ids: Any, rules: Rules, engine: EngineName) -> list[_Compared]:
    """A prompt ``[1, T]`` explained under ``auto`` and another engine, in turn; the fastest of a few times each."""
    import torch

    from gim.memory import run
    from gim.scoring import PREDICTION, Terms

    last = torch.tensor([[ids.shape[1] - 1]], device=ids.device)
    scored = Terms(last, torch.full_like(last, PREDICTION), torch.ones_like(last), "logit")
    # On a CPU the time that this process took, whatever else the machine does.
    clock = time.process_time if ids.device.type == "cpu" else time.perf_counter
    asked = (EngineName.AUTO, engine)
    seconds = dict.fromkeys(asked, float("inf"))
    found = {}
    for _ in range(COMPARED_TIMES):
        for one in asked:
            start = clock()
            found[one] = run(model, ids, None, scored, 0, rules, "layer", None, strict=False, engine=one.value)
            found[one].scores.sum().item()  # on a GPU, when it is done
            seconds[one] = min(seconds[one], clock() - start)
    ours = found[EngineName.AUTO].scores.double()
    tiny = torch.finfo(ours.dtype).tiny
    return [
        _Compared(
            one.value,
            _ran(found[one].report),
            seconds[one],
            float((found[one].scores.double() - ours).norm() / ours.norm().clamp_min(tiny)),
        )
        for one in asked
    ]


def _ran(report: AppliedReport) -> str:
    """What ran each part, in words."""
    return ", ".join(f"{part.replace('_', ' ')} by {name}" for part, name in report.engines.items())


def _show_compared(rows: list[_Compared]) -> None:
    """Engines side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    table.add_column("what ran", overflow="fold")
    for column in ("time", "over auto", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        ratio = row.seconds / rows[0].seconds
        table.add_row(row.asked, row.ran, f"{1000 * row.seconds:.1f} ms", f"{ratio:.2f}x", f"{row.difference:.1e}")
    console = Console()
    console.print(table)
    console.print(Text("difference: of the scores to auto's, norm over norm", "dim"))


def _show_kernels(device: Any) -> None:
    """What is known of the kernels on the device."""
    from rich.console import Console
    from rich.text import Text

    from gim_kernels.engines import checked_kernels

    known = checked_kernels(device)
    if known is not None:
        Console().print(Text.assemble(("kernels: ", "dim"), known))


def _show_report(model: str, rules: Rules, report: AppliedReport, prompt: str) -> None:
    """What each rule would be applied to, modules that differ in their numbers only in one row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gim.applied import PARTS
    from gim.report.text import visible

    console = Console()
    console.print(Text.assemble((visible(model), "bold"), "\n", (rules.describe(), "dim")))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("modules", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("what their backward does", overflow="fold")
    for part in PARTS:
        rows: dict[tuple[str, str, str, str], list[str]] = {}
        for found in report.of(part):
            pattern = re.sub(r"\d+", "#", found.module)
            key = (found.module_class, found.rule, found.recognised, pattern)
            rows.setdefault(key, []).append(found.module)
        for (module_class, rule, recognised, _), modules in rows.items():
            table.add_row(
                Text.assemble(visible(numbered(modules)), "\n", (visible(module_class), "dim")),
                str(len(modules)),
                Text.assemble(visible(rule), "\n", (f"{part.replace('_', ' ')}; {visible(recognised)}", "dim")),
            )
    console.print(table)
    if report.engines:
        console.print(Text.assemble(("ran: ", "dim"), visible(_ran(report))))
    for note in report.notes:
        console.print(Text.assemble(("note: ", "dim"), visible(note)))
    for module, reason in report.unsupported:
        console.print(Text.assemble(("not covered: ", "bold red"), visible(f"{module}: {reason}")))
    watched = f"watched, every operator of a forward over {prompt!r}" if report.watched else "not watched"
    console.print(Text.assemble((visible(watched), "dim")))
    verdict = (
        ("every rule can be applied", "green") if report.complete else ("NOT every rule can be applied", "bold red")
    )
    console.print(Text.assemble(verdict))


def numbered(modules: list[str]) -> str:
    """Names that differ in their numbers only, as one: layers.0.mlp, layers.1.mlp -> layers.{0-1}.mlp."""
    columns = zip(*(re.findall(r"\d+", module) for module in modules), strict=True)
    ranges = []
    for column in columns:
        numbers = sorted({int(number) for number in column})
        if len(numbers) == 1:
            ranges.append(str(numbers[0]))
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            ranges.append(f"{{{numbers[0]}-{numbers[-1]}}}")
        else:
            ranges.append("{" + ",".join(str(number) for number in numbers) + "}")
    parts = iter(ranges)
    return re.sub(r"\d+", lambda _: next(parts), modules[0])
