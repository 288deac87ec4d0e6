"""Memory plans on this machine: peak and time of each, and whether auto is among the fastest that fit.

``python -m benchmarks.plans --tokens 4096`` on a CPU that does nothing else. Every plan is run in turn, again and
again, so that drift of the machine hits all alike; predictions stand beside what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import gim
from benchmarks.cases import ExplainCase
from benchmarks.measure import MIB, Stopwatch, interleaved, peak_bytes
from gim import memory
from gim.plan import PLANS, MemoryPlan

BASELINE = 0
#: How much slower than the best explicit plan that fits auto may be.
ALLOWED = 1.1

app = typer.Typer(add_completion=False)
console = Console()


def _systems(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    def under(plan: MemoryPlan) -> Callable[[], torch.Tensor]:
        return lambda: gim.explain(model, ids, baseline_token_id=BASELINE, memory=plan)

    return {plan.name: under(plan) for plan in PLANS if plan.offload == "none" or ids.is_cuda}


@app.command()
def main(
    tokens: Annotated[int, typer.Option(help="Prompt length.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions of each plan.")] = 3,
) -> None:
    """Measure every plan, then hold auto against the best at three memory limits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, ids = ExplainCase("llama-8x512", tokens, "float32").build(device)
    systems = _systems(model, ids)
    estimates = {one.plan.name: one for one in gim.estimate_memory(model, tokens, plans=PLANS)}
    peaks = {name: peak_bytes(run) for name, run in systems.items()}  # each one's warm-up, too
    times = interleaved(systems, Stopwatch(device), repeats)
    table = Table(title=f"{tokens} tokens")
    for column in ("plan", "median s", "cost predicted", "peak MiB", "predicted MiB"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, measured in times.items():
        found = estimates[name]
        numbers = (f"{peaks[name] / MIB:.0f}", f"{found.activations / MIB:.0f}")
        table.add_row(name, f"{measured.median:.2f}", f"{found.relative_cost:.2f}x", *numbers)
    console.print(table)
    sizes = sorted(estimates[name].activations for name in systems)
    failed = False
    for need in (sizes[-1], sizes[len(sizes) // 2], sizes[0]):
        free = int(need / memory.AUTO_SHARE) + 1
        fitting = [name for name in systems if estimates[name].activations <= need]
        best = min(fitting, key=lambda name: times[name].median)
        chosen = memory.choose(model, ids, free=free).name
        ratio = times[chosen].median / times[best].median
        failed |= ratio > ALLOWED
        console.print(f"{free / MIB:.0f} MiB free: auto takes {chosen}, the best that fits is {best}: {ratio:.2f}x")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    app()
