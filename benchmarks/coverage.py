"""Tables of what is covered: each family of the tests by rule, and the census of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gim.applied import Part
from gim.context import inspect

CENSUS = Path(__file__).parent / "results" / "census.json"


def families_rows() -> list[list[str]]:
    """For each family of the tests: how the parts were recognised that each rule acts on."""
    # The families build random models, which is not worth doing for whoever only reads results.
    from tests.families import ENCODERS, FAMILIES, make

    rows = []
    for family in (*FAMILIES, *ENCODERS):
        model = make(family)
        report = inspect(model)
        if not report.complete:
            raise RuntimeError(f"{family} is not covered: {report.unsupported}")

        def how(part: Part, report: Any = report) -> str:
            found = sorted({row.recognised.split(": ")[-1] for row in report.of(part)})
            return ", ".join(found) or "none in the model"

        rows.append([family, type(model).__name__, how("attention"), how("norm"), how("gated_mlp")])
    return rows


def census() -> dict[str, Any]:
    """The committed census."""
    found: dict[str, Any] = json.loads(CENSUS.read_text(encoding="utf-8"))
    return found


def census_sentence() -> str:
    """How many classes are covered, refused, partial and not built."""
    results = census()
    by_status: dict[str, list[str]] = {}
    for row in results["rows"]:
        by_status.setdefault(row["status"], []).append(row["model_type"])
    counts = {status: len(by_status.get(status, [])) for status in ("covered", "refused", "partial", "not built")}
    built = counts["covered"] + counts["refused"] + counts["partial"]
    return (
        f"Of the {built} causal-LM classes of transformers {results['transformers']} that build from a small config, "
        f"{counts['covered']} ({counts['covered'] / built:.0%}) are covered by every rule, {counts['refused']} are "
        f"refused with the module's name, and {counts['partial']} are covered in part. {counts['not built']} more need "
        "a config of their own, and are not counted.\n"
    )
