"""What the documents say of measures for whole answers, made of the committed results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.faithfulness_tables import measured, table
from benchmarks.results import Results

_NAMES = {
    "logit": "logits",
    "logprob": "log-probabilities",
    "logodds": "log-odds",
    "runner-up": "logits minus the runner-up's",
}


def summary(results: Results | None) -> str:
    """Every measure on the half of the questions that did not choose it; empty without results."""
    if results is None:
        return ""
    rows = [
        [
            _NAMES[row["measure"]] + (" (chosen)" if row["measure"] == results["chosen"] else ""),
            str(row["questions"]),
            *(share(row[name]) for name in ("sign", "first")),
            f"{row['spearman'][0]:.2f} [{row['spearman'][1]:.2f}, {row['spearman'][2]:.2f}]",
        ]
        for row in results["rows"]
        if row["part"] == "reported"
    ]
    header = ["sum over the answer of", "questions", "sign right", "strongest token first", "rank correlation"]
    return table(header, rows) + measured(results)


def share(numbers: Sequence[float]) -> str:
    """A share of one as per cent, with its interval."""
    mean, low, high = (100 * one for one in numbers)
    return f"{mean:.0f} % [{low:.0f}, {high:.0f}]"
