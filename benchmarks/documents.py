"""Writes the generated parts of the documents from committed results: ``python -m benchmarks.documents``.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; a test holds that it is current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import coverage

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md")
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def latest(suite: str) -> dict[str, Any] | None:
    """The newest committed results of a suite, or None where it has never been measured."""
    found = [_load(path) for path in sorted(RESULTS.glob(f"{suite}-*.json"))]
    return max(found, key=lambda one: one["date"], default=None)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, rule, *rows))


def _measured(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"\nMeasured on {results['date']}: {results['device']}; {versions}; commit {results['commit']}.\n"


def _number(row: dict[str, Any] | None, key: str) -> float | None:
    return None if row is None or key not in row else float(row[key])


def explain_table() -> str:
    """Time and memory of one attribution against correct eager GIM."""
    results = latest("explain")
    if results is None:
        return "Not measured yet.\n"
    rows = []
    for tokens in sorted({row["tokens"] for row in results["rows"]}):
        by_system = {row["system"]: row for row in results["rows"] if row["tokens"] == tokens}
        ours, lean = by_system["gim-kernels GIM"], by_system["gim-kernels GIM, checkpoints"]
        constant, eager = by_system["gim-kernels GIM_CONSTANT"], by_system["eager GIM"]
        time, memory = _number(eager, "median_ms"), _number(eager, "peak_mib")
        rows.append(
            [
                str(tokens),
                f"{ours['median_ms'] / 1000:.2f} s",
                f"{constant['median_ms'] / 1000:.2f} s",
                f"{time / 1000:.2f} s" if time else eager["note"],
                f"{time / ours['median_ms']:.1f}x" if time else "",
                f"{ours['peak_mib']:.0f} MiB",
                f"{lean['peak_mib']:.0f} MiB",
                f"{memory:.0f} MiB" if memory else "",
                f"{memory / ours['peak_mib']:.0f}x" if memory else "",
            ]
        )
    header = [
        "tokens",
        "GIM",
        "GIM_CONSTANT",
        "eager GIM",
        "faster",
        "peak",
        "peak, checkpoints",
        "peak, eager",
        "less",
    ]
    return _table(header, rows) + _measured(results)


def statements_table() -> str:
    """How often each preset finds both statements of a fact."""
    results = latest("statements")
    if results is None:
        return "Not measured yet.\n"
    rows = [
        [row["rules"], f"{row['found']} of {row['prompts']}", f"{row['answered']} of {row['prompts']}"]
        for row in results["rows"]
    ]
    first = results["rows"][0]
    header = ["rules", f"both words among the top {first['top']} tokens", "answered rightly"]
    return _table(header, rows) + _measured(results)


def recall_table() -> str:
    """Held-out recall of the demo model."""
    rows = _load(ROOT / "gim" / "demo" / "model" / "recall.json")["rows"]
    return _table(
        ["tokens", "statements of the fact", "right answers"],
        [
            [str(row["tokens"]), str(row["statements"]), f"{row['right']} of {row['prompts']} ({row['recall']:.1%})"]
            for row in rows
        ],
    )


def families_table() -> str:
    """How the parts of each family are recognised."""
    header = ["family", "class", "softmax and q, k, v", "norms", "gated MLPs"]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, ["---"] * 5, *coverage.families_rows()))


GENERATORS: dict[str, Callable[[], str]] = {
    "families": families_table,
    "census": coverage.census_sentence,
    "explain": explain_table,
    "statements": statements_table,
    "recall": recall_table,
}


def current(text: str) -> str:
    """A document with its generated parts made anew.

    Raises:
        KeyError: a part that nothing generates.
    """
    return BLOCK.sub(lambda match: f"{match[1]}{GENERATORS[match[2]]()}{match[3]}", text)


def main() -> None:
    """Rewrite every document."""
    for path in DOCUMENTS:
        path.write_text(current(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
