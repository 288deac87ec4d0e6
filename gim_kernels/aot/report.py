"""The table of what the compiled code consists of, for people and for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from gim_kernels.aot.compiled import Compiled
from gim_kernels.aot.resources import whole_tile_stores
from gim_kernels.aot.variants import UNLIMITED


def report_rows(compiled: Iterable[Compiled]) -> list[dict[str, Any]]:
    """The rows of the compile report, sorted by key, limit and target."""
    rows = []
    for row in sorted(compiled, key=lambda row: (row.key, row.limit, row.target)):
        fields = asdict(row)
        for name in ("fingerprint", "symbol", "arguments", "boxes", "name"):
            del fields[name]
        fields["limit"] = None if row.limit == UNLIMITED else row.limit
        fields["block"] = list(row.block)
        rows.append(fields)
    return rows


def _resources(row: dict[str, Any] | None) -> str:
    """Registers, stack, spills and stores in loops of a row, as columns; nothing where it was not compiled."""
    if row is None:
        return "| | | "
    stores = " ".join(map(str, row["loop_stores"])) or "-"
    return f"{row['registers']} | {row['stack']} | {row['spills']} | {stores}"


def _stores(row: dict[str, Any]) -> int:
    """Stores to local memory in the loops over whole tiles."""
    return whole_tile_stores(row["loop_stores"], row["passes"] + row["key"].endswith("/sharp"))


def markdown(report: dict[str, Any]) -> str:
    """One line for each variant, with columns for each version of triton and a table for each target."""
    rows, beside = report["variants"], report["beside"]
    versions = [report["triton"], *([beside["triton"]] if beside else [])]
    lines = [
        "# Compile report",
        "",
        f"Compiled with triton {' and '.join(versions)} by `python -m gim_kernels.aot report`; nothing here was run.",
        "",
        "Tile: queries x keys (attention) or rows x columns, warps, stages. Registers and bytes of stack: for each "
        "thread. Spills: loads and stores of local memory. In loops: those stores in each loop over tiles, that over "
        "whole tiles first, then that over masked ones where there can be several, for each pass. Shared: KiB for each "
        "program. Matrix: matrix instructions in the code. ex2: exponentials in the code."
        + (f" On the right what triton {versions[1]} makes of it, where that was compiled." if beside else ""),
        "",
        "| target | triton | variants | most registers | stack | spills | in loops over whole tiles | most shared |",
        "|---|---|---|---|---|---|---|---|",
    ]
    targets = sorted({row["target"] for row in rows})
    for target in targets:
        for version, all_rows in zip(versions, (rows, beside.get("variants", [])), strict=False):
            here = [row for row in all_rows if row["target"] == target]
            if here:
                worst = [str(max(row[name] for row in here)) for name in ("registers", "stack", "spills")]
                worst.append(str(max(map(_stores, here))))
                worst.append(f"{max(row['shared'] for row in here) / 1024:g}")
                lines.append(f"| {target} | {version} | {len(here)} | {' | '.join(worst)} |")
    for target in targets:
        others = {(row["key"], row["limit"]): row for row in beside.get("variants", []) if row["target"] == target}
        head = "| variant | tile | registers | stack | spills | in loops | shared | matrix | ex2 |"
        rule = "|---|---|---|---|---|---|---|---|---|"
        if others:
            head += "".join(f" {name} {versions[1]} |" for name in ("registers", "stack", "spills", "in loops"))
            rule += "---|" * 4
        lines += ["", f"## {target}", "", head, rule]
        for row in rows:
            if row["target"] != target:
                continue
            width = "" if row["limit"] is None else f" up to {row['limit']}"
            tile = f"{row['block'][0]}x{row['block'][1]} {row['warps']}w {row['stages']}s"
            matrix = ", ".join(f"{count} {kind}" for kind, count in row["matrix"].items()) or "-"
            other = f" {_resources(others.get((row['key'], row['limit'])))} |" if others else ""
            lines.append(
                f"| {row['key']}{width} | {tile} | {_resources(row)} "
                f"| {(row['shared'] + row['shared_static']) / 1024:.3g} | {matrix} | {row['exponentials']} |{other}"
            )
    return "\n".join([*lines, ""])


def write_report(compiled: Iterable[Compiled], path: Path, beside: dict[str, Any] | None = None) -> None:
    """Write the report as ``path`` with the endings ``.json`` and ``.md``; the same input gives the same bytes.

    Args:
        compiled: the variants.
        path: without an ending.
        beside: a report that another version of triton made, to be shown next to this one.
    """

    def listed(rows: Iterable[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"

    rows = report_rows(compiled)
    other = {} if beside is None else {"triton": beside["triton"], "variants": beside["variants"]}
    head = {"triton": triton.__version__, "targets": sorted({row["target"] for row in rows})}
    text = f'{json.dumps(head)[:-1]}, "variants": {listed(rows)}, "beside": '
    text += f'{{"triton": "{other["triton"]}", "variants": {listed(other["variants"])}}}}}\n' if other else "{}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(text)
    path.with_suffix(".md").write_text(markdown({**head, "variants": rows, "beside": other}))
