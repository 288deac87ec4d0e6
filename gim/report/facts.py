"""What every view says of an attribution in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gim.answers import INTERRUPTED
from gim.report.text import number, one_line, shortened
from gim.targets import LIKELIEST, MEASURE_NAMES

if TYPE_CHECKING:
    from gim.attribution import Attribution

_KINDS = {
    "prediction": "the model\u2019s prediction {}",
    "token": "the next token {}",
    "contrast": "{}",
    "continuation": "the continuation {}",
    "answer": "the answer {}",
}


#: Columns of what is explained; an answer may have thousands, and stands below.
_HEADING = 60


def heading(attribution: Attribution) -> str:
    """What is explained, in a few words: of a long answer or continuation its beginning."""
    label = attribution.target.label
    if attribution.target.kind in ("answer", "continuation"):
        label = shortened(one_line(label), _HEADING)
    return _KINDS.get(attribution.target.kind, "{}").format(label)


def target(attribution: Attribution) -> str:
    """What is explained and its number; an answer is named by its length, for it stands beside."""
    explained = attribution.target
    count = len(explained.token_ids)
    tokens = f"{count:,} token{'s' if count > 1 else ''}"
    named = f"the whole answer, {tokens}" if explained.kind == "answer" else heading(attribution)
    return f"{named}, {MEASURE_NAMES[explained.measure]} {explained.value:.4g}"


def answer_facts(attribution: Attribution) -> list[tuple[str, str]]:
    """What stands on top of every picture: what is explained, what else may come next, what is not ranked."""
    facts = [("Target", target(attribution))]
    if attribution.next_tokens:
        # Of an answer they are those of its first token.
        name = "Likeliest first" if attribution.target.kind == "answer" else "Likeliest"
        likely = [f"{one.token!r} {100 * one.probability:.3g} %" for one in attribution.next_tokens]
        own = [f"; the answer's own {one}" for one in likely[LIKELIEST:]]  # which is none of them
        facts.append((name, ", ".join(likely[:LIKELIEST]) + "".join(own)))
    facts += [("Note", note) for note in attribution.report.notes if note.startswith(INTERRUPTED)]
    if any(attribution.aside):
        facts.append(("Set aside", _set_aside(attribution)))
    return facts


def method_facts(attribution: Attribution) -> list[tuple[str, str]]:
    """How it was found: name and value of each fact."""
    facts = [
        ("Model", attribution.model),
        ("Rules", attribution.rules.describe()),
        ("Engine", attribution.engine or "not recorded"),
        ("Applied to", attribution.report.summary()),
        ("Baseline", f"token {attribution.baseline[0]}, {attribution.baseline[1]!r}"),
        ("Prompt", f"{len(attribution):,} tokens"),
    ]
    if attribution.memory:
        facts.append(("Memory", attribution.memory))
    if attribution.versions:
        facts.append(("Versions", ", ".join(f"{name} {v}" for name, v in attribution.versions.items())))
    return facts


def _set_aside(attribution: Attribution) -> str:
    """What the tokens that are not ranked add up to: a first special token, which attention rests on where it finds
    nothing, other special tokens, and a chat template's own."""
    scores = attribution.scores.tolist()
    groups: dict[str, list[int]] = {}
    for position, is_aside in enumerate(attribution.aside):
        if is_aside and position == 0 and attribution.special[0]:
            groups[f"the first token {attribution.tokens[0]!r} (attention sink)"] = [0]
        elif is_aside:
            groups.setdefault("special" if attribution.special[position] else "template", []).append(position)
    names = {"special": "{} special token{}", "template": "{} token{} of the chat template"}
    return ", ".join(
        f"{names.get(name, name).format(f'{len(group):,}', 's' if len(group) > 1 else '')} "
        f"{number(sum(scores[position] for position in group))}"
        for name, group in groups.items()
    )


def uncovered(attribution: Attribution) -> list[str]:
    """Parts of the model that a rule was meant for and does not act on."""
    return [f"{name}: {reason}" for name, reason in attribution.report.unsupported]
