"""What the documents say of faithfulness, made of the committed results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.faithfulness import REFERENCE
from benchmarks.results import Results
from gim.evaluation.measures import HIGHER_IS_BETTER
from gim.evaluation.tasks import TASKS

#: What the summary compares by.
MEASURE = "logprob"
METRICS = ("comprehensiveness", "sufficiency")
#: How the page calls the measures.
NAMED = {
    "logprob": "log-probability",
    "logit": "ratio of raw logits",
    "logodds": "log-odds",
    "contrast": "contrast with the foil",
}

Row = Mapping[str, Any]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, rule, *rows))


def measured(results: Results) -> str:
    """What was measured, of which models, and what is missing."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    said = f"\nMeasured on {results['date']}: {results['device']}; {versions}; commit {results['commit']}."
    missing = dict.fromkeys(" ".join(name.split(".")[-2:]) for name in results["not_reached"])
    if missing:
        said += f" Not yet measured, on one model or both: {', '.join(missing)}."
    return said + "\n" + "".join(f"\n- {name}: {about}" for name, about in results["models"].items()) + "\n"


def groups(results: Results) -> dict[tuple[str, str], list[Row]]:
    """Rows by task and model, each with the reference among its methods."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results["rows"]:
        found.setdefault((row["task"], row["model"]), []).append(row)
    return found


def shifted_orders(results: Results) -> list[Mapping[str, Any]]:
    """By task and model the order of the methods, for each constant added to all logits."""
    return [job["order"] for job in results["jobs"].values() if "order" in job]


def verdicts(rows: Iterable[Row], metric: str, measure: str = MEASURE) -> tuple[list[str], list[str], list[str]]:
    """Methods that the reference is better than, not to be told from, and worse than, by the whole interval."""
    better, even, worse = [], [], []
    for row in rows:
        if (
            (row["measure"], row["metric"]) != (measure, metric)
            or row["method"] == REFERENCE
            or "difference" not in row
        ):
            continue
        above, below = row["difference_low"] > 0, row["difference_high"] < 0
        if not above and not below:
            even.append(row["method"])
        elif above == HIGHER_IS_BETTER[metric]:  # type: ignore[index]
            worse.append(row["method"])
        else:
            better.append(row["method"])
    return better, even, worse


def summary(results: Results | None, measures: tuple[str, ...] = (MEASURE,)) -> str:
    """For each task and model what GIM is better than, not separable from, and worse than; empty without results."""
    if results is None:
        return ""
    rows = []
    for (task, model), own in groups(results).items():
        count = next((row["n"] for row in own if "difference" in row), 0)
        for measure in measures:
            for metric in METRICS:
                words = (", ".join(kind) or "none" for kind in verdicts(own, metric, measure))
                rows.append([task, model, str(count), f"{metric}, {NAMED[measure]}", *words])
    header = ["task", "model", "examples", "by", f"{REFERENCE} is better than", "not separable from", "worse than"]
    return table(header, rows) + measured(results)


def tally(results: Results | None) -> str:
    """On how many pairs of task and model the reference is better than each method, not separable from it, or worse;
    empty without results."""
    if results is None:
        return ""
    counts: dict[tuple[str, str], list[int]] = {}
    for own in groups(results).values():
        for metric in METRICS:
            for place, names in enumerate(verdicts(own, metric)):
                for name in names:
                    counts.setdefault((name, metric), [0, 0, 0])[place] += 1
    rows = [
        [name, *(" / ".join(map(str, counts.get((name, metric), [0, 0, 0]))) for metric in METRICS)]
        for name in sorted({name for name, _ in counts})
    ]
    header = [f"{REFERENCE} against", *(f"{metric}: better / not separable / worse" for metric in METRICS)]
    return table(header, rows) + measured(results)


def ranks(results: Results | None) -> str:
    """The reference's place by comprehensiveness: in log-probability, and by ratios of logits plus a constant."""
    if results is None or not shifted_orders(results):
        return ""
    rows = []
    for one in shifted_orders(results):
        own = [
            row
            for row in groups(results)[one["task"], one["model"]]
            if (row["measure"], row["metric"]) == (MEASURE, "comprehensiveness") and "difference" in row
        ]
        own.sort(key=lambda row: -float(row["mean"]))
        orders = ([row["method"] for row in own], *one["by_constant"].values())
        rows.append([one["task"], one["model"], *(f"{names.index(REFERENCE) + 1} of {len(names)}" for names in orders)])
    constants = [
        f"as a ratio, {constant} added to all logits" for constant in shifted_orders(results)[0]["by_constant"]
    ]
    return table(["task", "model", "in log-probability", *constants], rows)


def everything(results: Results | None) -> str:
    """Every mean with its interval, a table for each task and model; and what a constant does to ratios of logits."""
    if results is None:
        return ""
    parts = []
    for (task, model), own in groups(results).items():
        first = own[0]
        lengths = f"{first['tokens_min']} to {first['tokens_max']} tokens"
        parts.append(f"\n### {task}, {model}\n\n{lengths}; {first['dropped']} examples dropped as wrong.\n\n")
        cells = {(row["method"], row["measure"], row["metric"]): row for row in own}
        methods = dict.fromkeys(row["method"] for row in own)
        for measures in (("logprob", "logit"), ("logodds", "contrast")):
            columns = [(measure, metric) for measure in measures for metric in METRICS]
            header = ["method", "n", *(f"{metric}, {NAMED[measure]}" for measure, metric in columns)]
            lines = [
                [name, str(cells[name, *columns[0]]["n"]), *(cell(cells[name, *column]) for column in columns)]
                for name in methods
            ]
            parts.append(table(header, lines) + "\n")
    return "".join(parts) + shifts(results) + measured(results)


def cell(row: Row) -> str:
    """A mean and its interval."""
    return f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def shifts(results: Results) -> str:
    """What adding a constant to all logits does to the order by ratios."""
    lines = ["\n### A constant added to all logits\n\nThe order by comprehensiveness as a ratio of logits:\n"]
    for one in shifted_orders(results):
        for constant, names in one["by_constant"].items():
            lines.append(f"\n- {one['task']}, {one['model']}, {constant} added: {', '.join(names)}")
    return "".join(lines) + "\n"


def tasks_table() -> str:
    """The tasks in the box."""
    return table(
        ["task", "what it asks", "source", "licence of its texts"],
        ([task.name, task.asks, task.source, task.licence] for task in TASKS.values()),
    )
