"""Results for people: rich tables, and pictures of time and memory over length."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.results import Results, Row, growth


def milliseconds(value: float) -> str:
    """Three significant digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def mebibytes(value: float) -> str:
    """One decimal below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def headline(results: Results) -> str:
    """One line: where and with what."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"{results['device']}; {versions}; commit {results['commit']}; {results['date']}"


def roofline_line(results: Results) -> str:
    """What the machine reached in the simplest programs, in the same run."""
    machine = results.get("machine")
    if not machine:
        return "copy bandwidth and matrix rate: not measured"
    rates = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in machine["matrix_gflops"].items())
    return f"copy {machine['copy_gb_per_s']:,.1f} GB/s; matrix product {rates}"


#: Share of the cores that others may use before times are called into question.
BUSY = 0.1


def busy(results: Results) -> str:
    """A warning where others used the processor as the run began; empty otherwise."""
    share = (results.get("machine") or {}).get("busy_share", 0.0)
    if share <= BUSY:
        return ""
    return f"others use {share:.0%} of this machine's cores: do not trust these times"


def case_table(rows: list[Row]) -> Group:
    """The rows of one case: a table of what was measured, and lines with backends and with reasons why not."""
    table = Table(
        title=rows[0]["case"],
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("system", overflow="fold")  # a name may take two lines; a number must not be cut
    for column in ("ms", "spread", "vs ours", "MiB", "GFLOP/s", "roof"):
        table.add_column(column, justify="right", no_wrap=True)
    ours = next((row["median_ms"] for row in rows if "median_ms" in row), None)
    lines = []
    for row in rows:
        if "median_ms" not in row:
            lines.append(Text.assemble("  ", (row["system"], "bold"), " ", (row["note"], "yellow")))
            continue
        share = row.get("roofline_share")
        table.add_row(
            row["system"],
            milliseconds(row["median_ms"]),
            spread(row),
            f"{row['median_ms'] / ours:.2f}x" if ours else "",
            mebibytes(row["peak_mib"]) if "peak_mib" in row else "",
            f"{row['gflops']:,.0f}" if "gflops" in row else "",
            "" if share is None else f"{share:.0%}",
        )
        if "backend" in row:
            lines.append(Text.assemble("  ", (row["system"], "bold"), " ", (row["backend"], "dim")))
    return Group(table, *lines) if table.row_count else Group(Text(rows[0]["case"], style="bold"), *lines)


def spread(row: Row) -> str:
    """Half the distance of the quartiles, of the extremes where there are none, in percent of the median."""
    low, high = ("q1_ms", "q3_ms") if "q1_ms" in row else ("min_ms", "max_ms")
    return f"\u00b1{50 * (row[high] - row[low]) / row['median_ms']:.0f}%"


def growth_table(rows: list[Row]) -> Table | None:
    """Fitted exponents; None where no system was measured at enough lengths."""
    fitted = growth(rows)
    if not fitted:
        return None
    table = Table(
        title="How cost grows: exponents over T",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("case", "system"):
        table.add_column(column, overflow="fold")
    for column in ("T", "time", "memory"):
        table.add_column(column, justify="right")
    for row in fitted:
        low, high = row["lengths"]
        exponents = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("time", "memory"))
        table.add_row(row["config"], row["system"], f"{low:,} .. {high:,}", *exponents)
    return table


def plot(results: Results, path: Path) -> None:
    """Write :func:`figure` as a PNG.

    Raises:
        ModuleNotFoundError, ValueError: as :func:`figure`.
    """
    figure(results).savefig(path, format="png", dpi=100)


def figure(results: Results) -> Any:
    """Time and memory over length, both axes logarithmic: a row of two panels for each config, a line for each system.

    The dashed line is the roofline: the least time that the machine's own copy bandwidth and matrix rate allow. A cross
    marks the length at which a system could not be measured.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: nothing was measured.
    """
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if "config" in row]
    lengths: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        if "median_ms" in row:
            lengths.setdefault((row["op"], row["config"]), set()).add(row["tokens"])
    if not lengths:
        raise ValueError("nothing to plot: no row was measured")
    # One length makes no line: such a config is drawn only where there is nothing else.
    panels = [panel for panel, found in lengths.items() if len(found) > 1] or list(lengths)
    # One colour for each system in all panels.
    systems = list(dict.fromkeys(row["system"] for row in rows))
    colours = dict(zip(systems, itertools.cycle(f"C{i}" for i in range(10)), strict=False))
    drawn = Figure(figsize=(12, 3.6 * len(panels) + 1.4), layout="constrained")
    axes = drawn.subplots(len(panels), 2, squeeze=False)
    for (op, config), (time_axis, memory_axis) in zip(panels, axes, strict=True):
        own = [row for row in rows if (row["op"], row["config"]) == (op, config)]
        for axis, key, label in ((time_axis, "median_ms", "time, ms"), (memory_axis, "peak_mib", "peak memory, MiB")):
            _panel(axis, own, key, colours)
            axis.set_title(f"{op} {config}", fontsize=9, loc="left")
            axis.set_xlabel("T, tokens")
            axis.set_ylabel(label)
        floor = sorted({(row["tokens"], row["roofline_ms"]) for row in own if "roofline_ms" in row})
        if floor:
            lowest: dict[int, float] = {}
            for tokens, value in floor:
                lowest[tokens] = min(value, lowest.get(tokens, value))
            time_axis.plot(list(lowest), list(lowest.values()), "k--", linewidth=1, label="roofline")
    # One legend below all panels: inside one it would hide lines.
    shown: dict[str, Any] = {}
    for axis in axes[:, 0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    drawn.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8)
    drawn.suptitle(headline(results), fontsize=8, x=0.01, ha="left")
    return drawn


def _panel(axis: Any, rows: list[Row], key: str, colours: dict[str, str]) -> None:
    """One panel: every system a line with its spread, and a cross where it was not measured."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    top = max((row[key] for row in rows if row.get(key, 0) > 0), default=1.0)
    for system, colour in colours.items():
        own = sorted((row for row in rows if row["system"] == system), key=lambda row: row["tokens"])
        done = [row for row in own if row.get(key, 0) > 0]
        if done:
            axis.plot(
                [row["tokens"] for row in done],
                [row[key] for row in done],
                "o-",
                color=colour,
                markersize=3,
                linewidth=1.2,
                label=system,
            )
        if key == "median_ms":
            for row in done:
                axis.vlines(row["tokens"], row["min_ms"], row["max_ms"], color=colour, linewidth=0.8)
        failed = [row["tokens"] for row in own if "note" in row]
        if failed:
            axis.plot(failed, [top] * len(failed), "x", color=colour, label=None if done else f"{system}: not measured")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.grid(True, which="both", linewidth=0.2)
