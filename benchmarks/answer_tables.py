"""What the documents say of measures for whole answers, made of the committed results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.faithfulness_tables import measured, table
from benchmarks.results import Results

_NAMES = {
    "logit": "logits",
    "logprob": "log-probabilities",
    "logodds": "log-odds",
    "contrast": "logits minus the likeliest other's",
}


def summary(results: Results | None) -> str:
    """Every measure under both softmax rules on the half of the questions that did not choose, and of every other
    preset the one that is best on the half that did; empty without results."""
    if results is None:
        return ""
    models = list(results["models"])
    parts = {(row["part"], row["rules"], row["measure"]): row for row in results["rows"] if row["part"] != "chosen on"}
    lines = []
    for part, rules, measure in parts:
        if part != "reported":
            continue
        row = parts[part, rules, measure]
        chosen = results["chosen"].get(rules) == measure
        firsts = [share(parts[one, rules, measure]["first"]) for one in ("reported", *models)]
        if "sign" not in row:
            lines.append([measure, rules, "", *firsts, ""])
        elif chosen or rules in ("GIM", "GIM_CONSTANT"):
            mean, low, high = row["spearman"]
            said = _NAMES[measure] + (" (best on the other half)" if chosen else "")
            lines.append([said, rules, share(row["sign"]), *firsts, f"{mean:.2f} [{low:.2f}, {high:.2f}]"])
    questions = next(iter(parts.values()))["questions"]
    header = ["sum over the answer of", "rules", "sign right", "strongest token first", *models, "rank correlation"]
    return f"{questions} questions.\n\n" + table(header, lines) + measured(results)


def share(numbers: Sequence[float]) -> str:
    """A share of one as per cent, with its interval."""
    mean, low, high = (100 * one for one in numbers)
    return f"{mean:.0f} % [{low:.0f}, {high:.0f}]"
