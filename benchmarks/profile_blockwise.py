"""Where the time of attention on a CPU goes: ``python -m benchmarks.profile_blockwise``.

One case, ours and torch's exact step side by side: medians interleaved, peak memory, and each system's operators by the
time that they take themselves.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import AttentionCase, Rule
from benchmarks.measure import MIB, Stopwatch, device_name, interleaved, peak_bytes
from benchmarks.systems import SYSTEMS

#: Ours and the floor: the exact gradient of torch's own kernel.
NAMES = ("gim-kernels", "torch SDPA, exact")


def main(
    tokens: Annotated[int, typer.Option(help="T.")] = 4096,
    heads: Annotated[int, typer.Option(help="HQ.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="HK.")] = 8,
    head_size: Annotated[int, typer.Option(help="D.")] = 64,
    rule: Annotated[str, typer.Option(help="temperature, exact or constant.")] = "temperature",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 7,
    top: Annotated[int, typer.Option(min=1, help="Operators to list.")] = 12,
) -> None:
    """Profile one attention step on the CPU."""
    names: dict[str, Rule] = {"temperature": "temperature", "exact": "exact", "constant": "constant"}
    case = AttentionCase(names[rule], head_size, tokens, heads, kv_heads, True, dtype)
    device, console = torch.device("cpu"), Console()
    inputs = case.inputs(device)
    runs = {one.name: one.prepare(case, inputs, device) for one in SYSTEMS[case.op] if one.name in NAMES}
    console.print(f"{case.name} on {device_name(device)}")
    for run in runs.values():
        run()
    watch = Stopwatch(device)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    times = interleaved(runs, watch, repeats)
    floor = NAMES[1]
    for name, found in times.items():
        console.print(
            f"{name:20} {1000 * found.median:8.1f} ms  {found.median / times[floor].median:5.2f}x time  "
            f"{peaks[name] / MIB:7.1f} MiB  {peaks[name] / peaks[floor]:5.2f}x memory"
        )
    for name, run in runs.items():
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            run()
        events = sorted(recorded.key_averages(), key=lambda one: -one.self_cpu_time_total)
        total = sum(one.self_cpu_time_total for one in events)
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("operator")
        for column in ("calls", "ms", "share"):
            table.add_column(column, justify="right")
        for event in events[:top]:
            own = event.self_cpu_time_total
            table.add_row(event.key, f"{event.count:,}", f"{own / 1000:,.1f}", f"{own / total:.0%}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
