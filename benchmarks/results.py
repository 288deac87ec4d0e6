"""Results files: their schema, reading, writing, comparing, and how cost grows with length.

A file holds one suite on one device: ``schema``, ``suite``, ``device``, ``system``, ``versions``, ``commit``, ``date``,
``machine`` (what the machine reached, or null where it was not measured), ``complete``, ``rows`` and, where a budget
was spent, ``not_reached``, names of cases.

A row has ``case``, ``op``, ``config``, ``tokens`` and ``system``; where it was measured, times in milliseconds,
``peak_mib``, ``gflops`` as FlashAttention counts them and the share of the roofline; elsewhere a ``note``: why not.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from gim.files import write_atomically

SCHEMA = 2

Row = dict[str, Any]
Results = dict[str, Any]


class ResultsError(ValueError):
    """A results file that cannot be used; the message says which and why."""


def load(path: Path) -> Results:
    """Read a results file.

    Raises:
        ResultsError: no such file, not a results file, or one of another schema version.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not a results file: {error}") from error
    if not isinstance(found, dict) or "schema" not in found:
        raise ResultsError(f"{path}: not a results file: it has no schema version")
    if found["schema"] != SCHEMA:
        raise ResultsError(f"{path}: schema version {found['schema']!r}, and this program reads version {SCHEMA} only")
    missing = [name for name in ("suite", "device", "versions", "commit", "date", "rows") if name not in found]
    if missing:
        raise ResultsError(f"{path}: not a results file: it has no {', '.join(missing)}")
    return found


def save(path: Path, results: Results) -> None:
    """Write a results file in one step, so that an interrupted run leaves the last whole one."""
    write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


def default_name(results: Results) -> str:
    """The file name under ``benchmarks/results``: suite, device and date."""
    device = str(results["device"]).split(",")[0].lower()
    slug = "-".join("".join(c if c.isalnum() else " " for c in device).split())
    return f"{results['suite']}-{slug}-{results['date']}.json"


def merged(path: Path, results: Results) -> Results:
    """The results with the rows of other cases that the same code measured on the same device into the same file."""
    if not path.exists():
        return results
    before = load(path)
    same = all(before[name] == results[name] for name in ("suite", "device", "versions", "commit"))
    if not same:
        return results
    measured = {row["case"] for row in results["rows"]}
    kept = [row for row in before["rows"] if row["case"] not in measured]
    return {**results, "rows": [*kept, *results["rows"]]}


def compare(old: Results, new: Results) -> list[Row]:
    """New against old, system by system.

    Returns:
        Rows with ``case``, ``system``, ``old_ms``, ``new_ms``, ``time_ratio`` (below 1: faster), ``memory_ratio`` (None
        where either has no peak) and ``beyond_spread`` (whether the quartiles of the two do not overlap).

    Raises:
        ResultsError: other devices, other suites, or nothing in common.
    """
    if old["device"] != new["device"]:
        raise ResultsError(f"results of different devices cannot be compared: {old['device']!r} and {new['device']!r}")
    if old["suite"] != new["suite"]:
        raise ResultsError(f"results of different suites cannot be compared: {old['suite']!r} and {new['suite']!r}")
    before = {(row["case"], row["system"]): row for row in old["rows"] if "median_ms" in row}
    rows = []
    for row in new["rows"]:
        was = before.get((row["case"], row["system"]))
        if was is None or "median_ms" not in row:
            continue
        low, high = ("q1_ms", "q3_ms") if "q1_ms" in was and "q1_ms" in row else ("min_ms", "max_ms")
        peaks = (was.get("peak_mib"), row.get("peak_mib"))
        rows.append(
            {
                "case": row["case"],
                "system": row["system"],
                "old_ms": was["median_ms"],
                "new_ms": row["median_ms"],
                "time_ratio": row["median_ms"] / was["median_ms"],
                "memory_ratio": peaks[1] / peaks[0] if peaks[0] and peaks[1] else None,
                "beyond_spread": row[low] > was[high] or row[high] < was[low],
            }
        )
    if not rows:
        raise ResultsError("the two files have no measured case and system in common")
    return rows


#: An exponent is fitted to no fewer lengths.
LEAST_LENGTHS = 3


def growth(rows: list[Row]) -> list[Row]:
    """Exponents of time and memory over length, fitted to the logarithms by least squares.

    Returns:
        A row for each config and system measured at :data:`LEAST_LENGTHS` lengths or more: ``config``, ``system``,
        ``lengths`` (smallest, largest), ``time`` and ``memory`` (None where no peak above 0 was measured).
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "median_ms" in row and "config" in row:
            groups.setdefault((f"{row['op']} {row['config']}", row["system"]), []).append(row)
    fitted = []
    for (config, system), measured in groups.items():
        lengths = sorted({row["tokens"] for row in measured})
        if len(lengths) < LEAST_LENGTHS:
            continue
        fitted.append(
            {
                "config": config,
                "system": system,
                "lengths": (lengths[0], lengths[-1]),
                "time": _exponent(measured, "median_ms"),
                "memory": _exponent(measured, "peak_mib"),
            }
        )
    return fitted


def _exponent(rows: list[Row], key: str) -> float | None:
    points = [(math.log(row["tokens"]), math.log(row[key])) for row in rows if row.get(key, 0) > 0]
    if len(points) < LEAST_LENGTHS:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope
