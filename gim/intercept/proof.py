"""Which forward passes of a model are watched, and what is said of what the watch finds.

One forward of each kind is: again where anything that decides which code runs has changed, and again where a forward
reaches a part that the watched one did not.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim.applied import Part
from gim.intercept.gates import original_forward
from gim.intercept.session import Session
from gim.intercept.watch import NO_GATE, NO_NORM, PART_OF, STOPS, Finding, Watch
from gim.parts import anatomy
from gim.rules import Rules

#: How many kinds of forward passes of one model are remembered; each module that is called from outside has its own.
_KINDS = 1024
#: How many ways through a model's code are remembered of each kind.
_WAYS = 63
_SIMPLE = frozenset({bool, str, float})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True)
class _Verdict:
    """What a watched forward told: the parts of the report that it reached, what the watch found and noted, and which
    functions of torch the code of which class called."""

    reached: frozenset[tuple[Part, str, str]]
    found: tuple[Finding, ...]
    noted: tuple[Finding, ...]
    calls: frozenset[tuple[type, Any]]


class _Kind:
    """What is known of forward passes of one kind: a verdict for each way through the model's code that was seen."""

    def __init__(self) -> None:
        self.verdicts: list[_Verdict] = []
        #: Other ways that were gone: what was reached and which modules ran. Until they are known, all is watched.
        self.awaited: list[tuple[frozenset[tuple[Part, str, str]], set[str]]] = []

    def add(self, verdict: _Verdict) -> None:
        """Enter what a watched forward told."""
        self.verdicts = [*self.verdicts[-_WAYS:], verdict]
        self.awaited = [way for way in self.awaited[-_WAYS:] if self.of(*way) is None]

    def all(self) -> _Verdict:
        """What all of them told together: of experts, each forward takes others."""
        found = [one for verdict in self.verdicts for one in verdict.found]
        noted = [one for verdict in self.verdicts for one in verdict.noted]
        reached = frozenset[tuple[Part, str, str]]().union(*(verdict.reached for verdict in self.verdicts))
        calls = frozenset[tuple[type, Any]]().union(*(verdict.calls for verdict in self.verdicts))
        return _Verdict(reached, tuple(dict.fromkeys(found)), tuple(dict.fromkeys(noted)), calls)

    def of(self, reached: frozenset[tuple[Part, str, str]], ran: set[str]) -> _Verdict | None:
        """What watched forwards told that reached the same, but in modules that did not run now."""

        def knows(one: _Verdict) -> bool:
            return reached <= one.reached and not any(row[1] in ran for row in one.reached - reached)

        found = next((one for one in reversed(self.verdicts) if knows(one)), None)
        if found is None and len(self.verdicts) > 1 and knows(all_of_them := self.all()):
            return all_of_them
        return found


#: Beside the models and not in them, so that no copy of a model takes over what was seen of another.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Kind]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@dataclass
class Run:
    """One forward pass: what is known of its way.

    Args:
        whole: whether it is of the model itself.
        verdict: None where no watched forward went its way.
        missed: modules that ran and that a rule had reached before.
    """

    whole: bool
    verdict: _Verdict | None = None
    missed: Sequence[str] = ()


class Proof:
    """That the rules of one session reach every part of a model."""

    def __init__(self, model: nn.Module, session: Session) -> None:
        self._model = weakref.ref(model)
        self._rules = session.rules
        self._report = session.report
        self._ran = session.ran
        self._called = session.called
        #: Whether code called in the last forward what it called in none that was watched: the next one is.
        self.runs_new_code = False

    @contextmanager
    def watching(self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Iterator[Run]:
        """Around a forward pass of the model, or of one of its modules from outside: watch it, unless one of its kind
        has been."""
        run, model = Run(whole=name == ""), self._model()
        assert model is not None, "it is being called"
        key = name, _kind_of(module, self._rules, inputs, named)
        with _lock:
            kinds = _verdicts.setdefault(model, {})
            kind = kinds.setdefault(key, _Kind())
            if len(kinds) > _KINDS:  # hooks that come and go make new kinds for ever
                del kinds[next(iter(kinds))]
        before = self._calls()
        self._ran.clear()
        self._called.clear()
        self.runs_new_code = False
        if kind.awaited or not kind.verdicts:
            with Watch(anatomy.of(model).modules, given=(inputs, named)) as watch:
                yield run
            run.verdict = _Verdict(self._reached_since(before), watch.found, watch.noted, frozenset(self._called))
            kind.add(run.verdict)
        else:
            yield run
            self._compare(run, kind, self._reached_since(before))
        self._report.watched = run.verdict is not None

    def _compare(self, run: Run, kind: _Kind, reached: frozenset[tuple[Part, str, str]]) -> None:
        """Find what is known of a forward that was not watched; nothing where none that was watched went its way."""
        known = kind.all()
        new = self._called - known.calls
        self.runs_new_code = bool(new)
        run.verdict = None if new else kind.of(reached, self._ran)
        if run.verdict is not None:
            return
        kind.awaited.append((reached, set(self._ran)))
        more = sorted({name for _, name, _ in reached - known.reached})
        if more:
            self._note(f"a forward pass reached {_several(more)}, which no watched one did: the next are watched again")
            return
        run.missed = sorted({name for _, name, _ in known.reached - reached if name in self._ran})
        if new and not run.missed:
            told = sorted(f"{cls.__name__} called {getattr(func, '__name__', func)}" for cls, func in new)
            self._note(f"{_several(told)}, which no watched forward pass did: the next are watched again")

    def unreached(self, run: Run) -> list[tuple[str, str]]:
        """Name and reason of every part that the rules should have reached in a forward pass and did not."""
        verdict, model = run.verdict, self._model()
        if verdict is None:
            reason = (
                "a rule was applied here in a forward that was watched, and not in this one: run it again to watch it"
            )
            return [(name or type(model).__name__, reason) for name in run.missed]
        for place in dict.fromkeys((one.kind, one.place, one.operator) for one in verdict.noted):
            kind, line, operator = place
            modules = dict.fromkeys(one.module for one in verdict.noted if (one.kind, one.place, one.operator) == place)
            self._note(f"{kind} ({operator}, {line}): no rule is about it; in {_several(list(modules))}")
        rules = self._rules
        wanted: dict[Part, bool] = {
            "attention": rules.modifies_attention,
            "norm": rules.freeze_norm,
            "gated_mlp": rules.modifies_gated_mlps,
        }
        for each in wanted:
            if wanted[each] and run.whole:
                self._report.note_absent(each)
        told = [name for name, _ in self._report.unsupported]
        missing: dict[tuple[str, str], None] = {}
        for one in verdict.found:
            part = PART_OF.get(one.kind)
            always = one.kind in ("dropout", STOPS)
            acts = wanted[part] if part is not None else always or any(wanted.values())
            if acts and not any(one.module == name or one.module.startswith(f"{name}.") for name in told):
                missing[one.module or type(model).__name__, f"{one}, {_consequence(one)}"] = None
        return list(missing)

    def _note(self, words: str) -> None:
        if words not in self._report.notes:
            self._report.notes.append(words)

    def _calls(self) -> dict[int, int]:
        return {id(row): row.calls for row in self._report.applications}

    def _reached_since(self, before: dict[int, int]) -> frozenset[tuple[Part, str, str]]:
        return frozenset(
            (row.part, row.module, row.recognised)
            for row in self._report.applications
            if row.calls != before.get(id(row), 0)
        )


def _consequence(finding: Finding) -> str:
    if finding.kind == "dropout":
        return "acts: call model.eval(), attributions are deterministic"
    if finding.kind in (NO_GATE, NO_NORM):
        return "which no rule is about, and one has acted on it"
    if finding.kind == STOPS:
        return "so that what flows through it would be left out"
    if finding.kind == "opaque operator":
        return "which another library computes, so that no rule can be seen to act in it"
    if finding.kind == "tensor written out of sight":
        return "by code that calls no operator of torch, or on another thread, so that no rule can be seen to act in it"
    return "which no rule has reached"


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _kind_of(module: nn.Module, rules: Rules, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Everything that decides which code a forward runs, as far as it can be told without running it."""
    config = getattr(module, "config", None)
    return (
        rules,
        torch.is_grad_enabled(),
        torch._C._is_any_autocast_enabled(),
        _simple(config) if config is not None else (),
        tuple(map(_sketch, inputs)),
        tuple((name, _sketch(one)) for name, one in sorted(named.items())),
        tuple(nn.modules.module._global_forward_hooks),
        tuple(nn.modules.module._global_forward_pre_hooks),
        tuple(_kind_of_module(one) for one in anatomy.of(module).modules.values()),
    )


def _kind_of_module(module: nn.Module) -> Any:
    held = module.__dict__
    hooks = tuple(_hook(number, hook) for name in _HOOKS for number, hook in held[name].items())
    return (
        type(module),
        _code(original_forward(module)),
        hooks,
        # A traced module has its parameters elsewhere.
        tuple([_kind_of_weight(one) for one in module._parameters.values() if one is not None]),
        _simple(module),
    )


def _kind_of_weight(weight: torch.Tensor) -> Any:
    """A quantised one is run by what it keeps beside itself, and some are packed anew for inference."""
    beside = vars(weight)
    kept = [(name, _simple(one)) for name, one in beside.items() if hasattr(one, "__dict__")] if beside else ()
    return (weight.dtype, weight.requires_grad, *_simple(weight), *kept)


def _hook(number: int, hook: Any) -> Any:
    """The package's own hooks by their code, since each session has its own; a user's by its handle."""
    return _code(hook) if str(getattr(hook, "__module__", "")).startswith("gim.") else number


def _code(function: Any) -> Any:
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", None) or id(function)


def _simple(thing: Any) -> tuple[Any, ...]:
    """The switches that an object holds."""
    return tuple([(name, value) for name, value in vars(thing).items() if type(value) in _SIMPLE])


def _sketch(argument: Any) -> Any:
    """What of an argument may decide which code runs."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.dim(), argument.requires_grad, 1 in argument.shape)
    return argument if argument is None or isinstance(argument, bool | str) else type(argument)
