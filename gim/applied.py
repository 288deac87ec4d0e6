"""What was applied to which module, by which recognition, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["attention", "norm", "gated_mlp"]
PARTS: tuple[Part, ...] = ("attention", "norm", "gated_mlp")

#: Notes that a rule has nothing to act on; each stands only until something of its part is found.
ABSENT: dict[Part, str] = {
    "attention": "softmax_temperature, q_scale, k_scale and v_scale: the model has no attention",
    "norm": "freeze_norm: the model has no norm",
    "gated_mlp": "gate_scale and up_scale: the model has no gated MLP",
}


class UnsupportedModelError(RuntimeError):
    """A rule that was asked for could not be applied to a part of the model, which the message names."""


@dataclass
class Application:
    """One module and what is done to its backward.

    Args:
        part: which kind of module it is.
        module: its qualified name in the model.
        module_class: the name of its class.
        rule: what its backward does, in words.
        recognised: how it was recognised, in words.
        engine: the code that ran it last, as that said itself; ``"torch"`` is the model's own operations; empty before
            the first call.
        calls: how often it ran inside the context.
    """

    part: Part
    module: str
    module_class: str
    rule: str
    recognised: str
    engine: str = ""
    calls: int = 0


@dataclass
class AppliedReport:
    """Every application of a rule inside one :class:`gim.GIM` context.

    Args:
        rules: the rules, in one line.
        applications: one row for each module a rule acts on.
        unsupported: qualified name and reason of each part that a rule should act on and does not; filled
            only under ``strict=False``, since a strict context raises instead.
        notes: rules that have nothing to act on, and MLPs that a memory plan could not run in tiles, and why.
        forwards: complete forward passes of the model inside the context.
        watched: whether the last of them, or one of its kind, ran under :class:`gim.intercept.watch.Watch`, which saw
            every operator and would have found a part that no rule reached.
    """

    rules: str = ""
    applications: list[Application] = field(default_factory=list)
    unsupported: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forwards: int = 0
    watched: bool = False

    def of(self, part: Part) -> list[Application]:
        """The applications to modules of one kind."""
        return [application for application in self.applications if application.part == part]

    @property
    def engines(self) -> dict[str, str]:
        """For each part that ran, the engines that ran it, joined by a plus sign."""
        return {
            part: "+".join(sorted({a.engine for a in self.of(part) if a.engine}))
            for part in PARTS
            if any(a.engine for a in self.of(part))
        }

    @property
    def engine(self) -> str:
        """The engine of attention, or the first that ran; empty before the first call."""
        return next(iter(self.engines.values()), "")

    @property
    def complete(self) -> bool:
        """Whether every rule that was asked for acts on every part it should act on."""
        return not self.unsupported

    def found(self, part: Part) -> None:
        """Take back the note that there is nothing of a part, if it stands."""
        self.notes[:] = [note for note in self.notes if note != ABSENT[part]]

    def note_absent(self, part: Part) -> None:
        """Note that there is nothing of a part, unless there is."""
        if not self.of(part):
            self.note(ABSENT[part])

    def note(self, words: str) -> None:
        """Note something, once."""
        if words not in self.notes:
            self.notes.append(words)

    def leave_out(self, missing: Iterable[tuple[str, str]]) -> None:
        """Enter what is not covered, each once."""
        self.unsupported.extend(pair for pair in missing if pair not in self.unsupported)

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each part: modules a rule acts on, and calls of them."""
        return {part: (len(self.of(part)), sum(a.calls for a in self.of(part))) for part in PARTS}

    def summary(self) -> str:
        """One line: how many modules of each kind, their calls, and what is not covered."""
        words = {"attention": "attention", "norm": "norms", "gated_mlp": "gated MLPs"}
        parts = [f"{n} {words[part]} ({calls} calls)" for part, (n, calls) in self.counts().items()]
        if self.unsupported:
            parts.append("NOT covered: " + ", ".join(name for name, _ in self.unsupported))
        parts.append("watched" if self.watched else "not watched")
        return "; ".join(parts)

    def __str__(self) -> str:
        return f"{self.rules}. {self.summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "rules": self.rules,
            "applications": [vars(application) for application in self.applications],
            "unsupported": [list(pair) for pair in self.unsupported],
            "notes": list(self.notes),
            "forwards": self.forwards,
            "watched": self.watched,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> AppliedReport:
        """The inverse of :meth:`to_dict`."""
        return cls(
            rules=fields["rules"],
            applications=[Application(**row) for row in fields["applications"]],
            unsupported=[(name, reason) for name, reason in fields["unsupported"]],
            notes=list(fields["notes"]),
            forwards=fields["forwards"],
            watched=fields.get("watched", False),
        )
