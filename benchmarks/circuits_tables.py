"""What the documents say of circuits, made of the committed results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.faithfulness_tables import measured, table
from benchmarks.results import Results


def summary(results: Results | None) -> str:
    """CPR and CMD of every method with their intervals, and what a pair costs; empty without results."""
    if results is None:
        return ""
    rows = [
        [
            row["task"],
            row["model"],
            row["method"],
            str(row["cpr"]["n"]),
            _interval(row["cpr"]),
            _interval(row["cmd"]),
            f"{row['seconds_a_pair']:.2f} s" if "seconds_a_pair" in row else "",
            f"{row['peak_mib']:.0f} MiB" if "peak_mib" in row else "",
        ]
        for row in results["rows"]
    ]
    header = ["task", "model", "method", "pairs", "CPR, higher is better", "CMD, lower is better", "a pair", "peak"]
    return table(header, rows) + measured(results)


def _interval(one: Mapping[str, Any]) -> str:
    return f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
