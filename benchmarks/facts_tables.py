"""What the documents say of how often a fact's subject comes first, made of the committed results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.answer_tables import share
from benchmarks.facts import PRESETS
from benchmarks.faithfulness_tables import measured, table
from benchmarks.results import Results

Row = Mapping[str, Any]

_ABSOLUTE, _POSITIVE = "absolute", "positive"
#: What a result ranks by where nothing else is asked for.
_DEFAULT = {"rules": "GIM", "measure": "logit", "baseline": "default", "first": "as it is"}


def best(rows: Iterable[Row], kind: str) -> Row:
    """The setting whose subject is first most often on the half that chooses; of equal ones the first."""
    return max(rows, key=lambda row: float(row[f"chosen on, {kind}"][0]))


def summary(results: Results | None) -> str:
    """For each model the default, the best measure and baseline of each preset, and the best of all; empty without
    results."""
    if results is None:
        return ""
    lines = []
    for model in results["models"]:
        own = [row for row in results["rows"] if row["model"] == model]
        named = [("the default", next(row for row in own if {name: row[name] for name in _DEFAULT} == _DEFAULT))]
        named += [
            (f"best of {preset}", best((row for row in own if row["rules"] == preset), _ABSOLUTE)) for preset in PRESETS
        ]
        named.append(("best of all", best(own, _ABSOLUTE)))
        lines += [
            [
                model,
                str(row["facts"]),
                name,
                f"{row['rules']}, {row['measure']}, {_baseline(row)}",
                *(share(row[f"reported, {kind}"]) for kind in (_ABSOLUTE, _POSITIVE)),
            ]
            for name, row in named
        ]
    header = ["model", "facts", "", "setting", "subject first, by absolute score", "by positive score"]
    return table(header, lines) + measured(results)


def _baseline(row: Row) -> str:
    words = {"default": "space as baseline", "none": "no baseline"}.get(
        row["baseline"], f"{row['baseline']!r} as baseline"
    )
    return words + (", the first token compared with itself" if row["first"] == "itself" else "")
