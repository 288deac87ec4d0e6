"""Writes the generated parts of the documents from committed results: ``python -m benchmarks.documents``.

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; a test holds that it is current.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import answer_tables, circuits_tables, coverage, facts_tables, faithfulness_tables
from benchmarks.report import milliseconds, roofline_line, spread
from benchmarks.results import Results, Row, default_name, growth, load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", RESULTS / "README.md", RESULTS / "faithfulness.md")
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


NOT_MEASURED = "Not measured.\n"
#: Kinds of device as people call them.
KINDS = {"cpu": "a CPU", "gpu": "a GPU"}


def latest(suite: str, kind: str = "cpu") -> Results | None:
    """The newest committed results of a suite on a kind of device, or None where it has never been measured there."""
    # The census and the compile report stand beside them, without a date in their names.
    found = [load(path) for path in sorted(RESULTS.glob("*-*.json"))]
    own = [one for one in found if one["suite"] == suite and ("threads" in one["device"]) == (kind == "cpu")]
    return max(own, key=lambda one: str(one["date"]), default=None)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, rule, *rows))


def _measured(results: Results) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    part = "" if results.get("complete", True) else " The run was cut before its end."
    return f"\nMeasured on {results['date']}: {results['device']}; {versions}; commit {results['commit']}.{part}\n"


def _number(row: dict[str, Any] | None, key: str) -> float | None:
    return None if row is None or key not in row else float(row[key])


def explain_table() -> str:
    """Time and memory of one attribution against correct eager GIM."""
    results = latest("explain")
    if results is None:
        return NOT_MEASURED
    rows = []
    config = "llama-8x512 float32"
    for tokens in sorted({row["tokens"] for row in results["rows"] if row["config"] == config}):
        by_system = {
            row["system"]: row for row in results["rows"] if (row["tokens"], row["config"]) == (tokens, config)
        }
        names = ("gim-kernels GIM", "gim-kernels GIM, checkpoints", "gim-kernels GIM_CONSTANT", "eager GIM")
        ours, lean, constant, eager = (by_system.get(name, {"note": "not measured"}) for name in names)
        if any("median_ms" not in one for one in (ours, lean, constant)):
            continue  # the results page has what there is
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
                _time_and_peak(by_system.get("gim-explain, TransformerLens HookedTransformer")),
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
        "gim-explain on TransformerLens",
    ]
    return _table(header, rows) + _measured(results)


def _time_and_peak(row: Row | None) -> str:
    if row is None:
        return "not measured"
    return f"{row['median_ms'] / 1000:.2f} s, {row['peak_mib']:.0f} MiB" if "median_ms" in row else str(row["note"])


def statements_table() -> str:
    """How often each preset finds both statements of a fact."""
    results = latest("statements")
    if results is None:
        return NOT_MEASURED
    rows = [
        [row["rules"], f"{row['found']} of {row['prompts']}", f"{row['answered']} of {row['prompts']}"]
        for row in results["rows"]
    ]
    first = results["rows"][0]
    header = ["rules", f"both words among the top {first['top']} tokens", "answered rightly"]
    return _table(header, rows) + _measured(results)


def recall_table() -> str:
    """Held-out recall of the demo model."""
    rows = json.loads((ROOT / "gim" / "demo" / "model" / "recall.json").read_text(encoding="utf-8"))["rows"]
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


def suite_table(suite: str, kind: str) -> str:
    """Every row of a suite on a kind of device."""
    results = latest(suite, kind)
    if results is None:
        return NOT_MEASURED
    rows = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        own = [row for row in results["rows"] if row["case"] == case]
        ours = next((row["median_ms"] for row in own if "median_ms" in row), None)
        for row in own:
            if "median_ms" not in row or ours is None:
                rows.append([case, row["system"], row["note"], *[""] * 5])
                continue
            share = row.get("roofline_share")
            rows.append(
                [
                    case,
                    row["system"],
                    milliseconds(row["median_ms"]),
                    spread(row),
                    f"{row['median_ms'] / ours:.2f}x",
                    f"{row['peak_mib']:,.1f}",
                    f"{row['gflops']:,.0f}",
                    "not measured" if share is None else f"{share:.0%}",
                ]
            )
    header = ["case", "system", "median ms", "spread", "of ours", "peak MiB", "GFLOP/s", "share of roofline"]
    roofline = f"\nThe roofline: {roofline_line(results)}.\n"
    return _table(header, rows) + _backends(results["rows"]) + roofline + _measured(results) + _picture(results)


def _picture(results: Results) -> str:
    """The results' plot, where there is one beside them."""
    name = Path(default_name(results)).with_suffix(".png").name
    drawn = (RESULTS / name).exists()
    return f"\n![time and memory over length, {results['suite']}, {results['device']}]({name})\n" if drawn else ""


def _backends(rows: list[Row]) -> str:
    """What each system of a suite was pinned to, or found to apply; a line for each."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "backend" in row and row["backend"] not in found.setdefault(row["system"], []):
            found[row["system"]].append(row["backend"])
    return "".join(["\n", *(f"- {system}: {' / '.join(given)}.\n" for system, given in found.items())]) if found else ""


#: What the README shows of attention: lengths, and what else the config must be. The results page has everything.
SUMMARY = {
    "cpu": ((4096,), "8/8 heads causal float32"),
    "gpu": ((8192, 16384), "32/32 heads causal bfloat16"),
}


def attention_table() -> str:
    """Attention alone: our steps over torch's exact one and eager GIM, on each kind of device."""
    parts = []
    for kind, called in KINDS.items():
        results = latest("attention", kind)
        if results is None:
            parts.append(f"Attention alone on {called}: not measured.\n")
            continue
        rows = []
        lengths, config = SUMMARY[kind]
        shown = [row for row in results["rows"] if row["tokens"] in lengths and row["config"].endswith(config)]
        for case in dict.fromkeys(row["case"] for row in shown):
            own = {row["system"]: row for row in shown if row["case"] == case}
            ours = own.get("gim-kernels", {})
            if "median_ms" not in ours:
                continue
            others = [own.get(name, {}) for name in ("torch SDPA, exact", "eager GIM")]
            rows.append(
                [
                    case.removeprefix("attention "),
                    f"{milliseconds(ours['median_ms'])} ms",
                    *(_ratio(ours, other, "median_ms") for other in others),
                    f"{ours['peak_mib']:,.1f} MiB",
                    *(_ratio(ours, other, "peak_mib") for other in others),
                ]
            )
        header = ["attention alone", "ours", "over torch's exact step", "over eager GIM", "peak"]
        parts.append(_table([*header, "over torch's", "over eager's"], rows) + _measured(results))
    return "\n".join(parts)


def _ratio(ours: Row, other: Row, key: str) -> str:
    return f"{ours[key] / other[key]:.2f}x" if other.get(key) else str(other.get("note", "not measured"))


def growth_table() -> str:
    """Fitted exponents of time and memory over T, of the newest results of every suite."""
    parts = []
    for suite in ("attention", "explain", "memory"):
        for kind in KINDS:
            results = latest(suite, kind)
            fitted = [] if results is None else growth(results["rows"])
            if results is None or not fitted:
                continue
            rows = [
                [
                    row["config"],
                    row["system"],
                    f"{row['lengths'][0]} to {row['lengths'][1]}",
                    *("" if row[key] is None else f"{row[key]:.2f}" for key in ("time", "memory")),
                ]
                for row in fitted
            ]
            parts.append(_table(["case", "system", "T", "time", "memory"], rows) + _measured(results))
    return "\n".join(parts) or NOT_MEASURED


GENERATORS: dict[str, Callable[[], str]] = {
    "families": families_table,
    "census": coverage.census_sentence,
    **{
        f"{suite}-{kind}": functools.partial(suite_table, suite, kind)
        for suite in ("attention", "pointwise", "explain", "memory")
        for kind in KINDS
    },
    "attention": attention_table,
    "growth": growth_table,
    "explain": explain_table,
    "statements": statements_table,
    "recall": recall_table,
    "faithfulness": lambda: faithfulness_tables.tally(latest("faithfulness")) or NOT_MEASURED,
    "faithfulness-summary": lambda: (
        faithfulness_tables.summary(latest("faithfulness"), ("logprob", "contrast")) or NOT_MEASURED
    ),
    "faithfulness-all": lambda: faithfulness_tables.everything(latest("faithfulness")) or NOT_MEASURED,
    "faithfulness-ranks": lambda: faithfulness_tables.ranks(latest("faithfulness")) or NOT_MEASURED,
    "tasks": faithfulness_tables.tasks_table,
    "answers": lambda: answer_tables.summary(latest("answers")) or NOT_MEASURED,
    "facts": lambda: facts_tables.summary(latest("facts")) or NOT_MEASURED,
    "circuits": lambda: circuits_tables.summary(latest("circuits")) or NOT_MEASURED,
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
