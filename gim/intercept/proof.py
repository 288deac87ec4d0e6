"""Which forward passes of a model are watched, and what is said of what the watch finds.

One forward of each kind is: again where anything that decides which code runs has changed, and again where a forward
reaches a part that the watched one did not.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim.applied import Part
from gim.intercept.callers import code_of
from gim.intercept.gates import interrupted, original_forward
from gim.intercept.session import Session
from gim.intercept.watch import NO_GATE, NO_NORM, PART_OF, STOPS, Finding, Watch
from gim.parts import anatomy
from gim.rules import Rules

#: How many kinds of forward passes of one model are remembered; each module that is called from outside has its own.
_KINDS = 256
#: How many ways through a model's code are remembered of each kind.
_WAYS = 63
_SIMPLE = frozenset({bool, str, float})


@dataclass(frozen=True)
class _Verdict:
    """What a watched forward told: the parts of the report that it reached, what the watch found and noted, which
    functions of torch the code of which class called, and the names of the modules that ran."""

    reached: frozenset[tuple[Part, str, str]]
    found: tuple[Finding, ...]
    noted: tuple[Finding, ...]
    calls: frozenset[tuple[type, Any]]
    ran: frozenset[str]


class _Kind:
    """What is known of forward passes of one kind: a verdict for each way through the model's code that was seen."""

    def __init__(self) -> None:
        self.verdicts: list[_Verdict] = []
        #: What all of them told together: of experts, each forward takes others.
        self.known = _together([])
        #: Other ways that were gone: what was reached and which modules ran. Until they are known, all is watched.
        self.awaited: list[tuple[frozenset[tuple[Part, str, str]], set[str]]] = []

    @property
    def is_proved(self) -> bool:
        """Whether no way is awaited, and the last forward that was watched had nothing left to find: what is found may
        have been put right since."""
        return bool(self.verdicts) and not self.awaited and not self.verdicts[-1].found

    def add(self, verdict: _Verdict) -> None:
        """Enter what a watched forward told, in place of what those found that were refused."""
        self.verdicts = [*(one for one in self.verdicts[-_WAYS:] if not one.found), verdict]
        self.known = _together(self.verdicts)
        self.awaited = [way for way in self.awaited[-_WAYS:] if self.of(*way) is None]

    def of(self, reached: frozenset[tuple[Part, str, str]], ran: set[str]) -> _Verdict | None:
        """What watched forwards told that reached the same, but in modules that did not run now."""

        def knows(one: _Verdict) -> bool:
            return reached <= one.reached and not any(row[1] in ran for row in one.reached - reached)

        if not ran <= self.known.ran:
            return None
        return next((one for one in (*reversed(self.verdicts), self.known) if knows(one)), None)


def _together(verdicts: list[_Verdict]) -> _Verdict:
    found = [one for verdict in verdicts for one in verdict.found]
    noted = [one for verdict in verdicts for one in verdict.noted]
    reached = frozenset[tuple[Part, str, str]]().union(*(verdict.reached for verdict in verdicts))
    calls = frozenset[tuple[type, Any]]().union(*(verdict.calls for verdict in verdicts))
    ran = frozenset[str]().union(*(verdict.ran for verdict in verdicts))
    return _Verdict(reached, tuple(dict.fromkeys(found)), tuple(dict.fromkeys(noted)), calls, ran)


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
        self._stack = session.stack
        self._rules = session.rules
        self._wanted: dict[Part, bool] = {
            "attention": session.rules.modifies_attention,
            "norm": session.rules.freeze_norm,
            "gated_mlp": session.rules.modifies_gated_mlps,
        }
        self._early = session.early
        self._report = session.report
        self._ran = session.ran
        self._called = session.called
        #: Whether code called in the last forward what it called in none that was watched: the next one is.
        self.runs_new_code = False

    @contextmanager
    def watching(
        self, run: Run, name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> Iterator[None]:
        """Around a forward pass of the model, or of one of its modules from outside: watch it, unless one of its kind
        has been. What is seen until an error ends it is told of it too, but of no other."""
        model = self._model()
        assert model is not None, "it is being called"
        key = name, _kind_of(module, self._rules, inputs, named)
        with _lock:
            kinds = _verdicts.setdefault(model, {})
            kind = kinds[key] = kinds.pop(key) if key in kinds else _Kind()
            if len(kinds) > _KINDS:
                del kinds[next(iter(kinds))]  # that was not asked for the longest
        before = {id(row): row.calls for row in self._report.applications}
        self._ran.clear()
        self._called.clear()
        self.runs_new_code = False
        watch = None if kind.is_proved else Watch(anatomy.of(model).modules, given=(inputs, named))
        ended = True
        try:
            with watch or nullcontext():
                yield
            ended = False
        except BaseException as error:
            self._ran.difference_update(interrupted(error, self._stack))
            run.whole = False
            raise
        finally:
            reached = self._reached_since(before)
            if watch is None:
                self._compare(run, kind, reached)
            else:
                found = tuple(one for one in watch.found if self._acts(one))
                run.verdict = _Verdict(
                    reached, found, tuple(watch.noted), frozenset(self._called), frozenset(self._ran)
                )
                if not ended:
                    kind.add(run.verdict)
            self._report.watched = run.verdict is not None

    def _compare(self, run: Run, kind: _Kind, reached: frozenset[tuple[Part, str, str]]) -> None:
        """Find what is known of a forward that was not watched; nothing where none that was watched went its way."""
        known = kind.known
        new = self._called - known.calls
        self.runs_new_code = bool(new)
        run.verdict = None if new else kind.of(reached, self._ran)
        if run.verdict is not None:
            return
        kind.awaited.append((reached, set(self._ran)))
        more = sorted({name for _, name, _ in reached - known.reached} | self._ran - known.ran)
        if more:
            self._report.note(
                f"a forward pass reached {_several(more)}, which no watched one did: the next are watched again"
            )
            return
        run.missed = sorted({name for _, name, _ in known.reached - reached if name in self._ran})
        if new and not run.missed:
            told = sorted(f"{cls.__name__} called {getattr(func, '__name__', func)}" for cls, func in new)
            self._report.note(f"{_several(told)}, which no watched forward pass did: the next are watched again")

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
            self._report.note(f"{kind} ({operator}, {line}): no rule is about it; in {_several(list(modules))}")
        for each in self._wanted:
            if self._wanted[each] and run.whole:
                self._report.note_absent(each)
        told = [pair[0] for pair in self._report.unsupported if pair not in self._early]
        missing: dict[tuple[str, str], None] = {}
        for one in verdict.found:
            if not any(one.module == name or one.module.startswith(f"{name}.") for name in told):
                missing[
                    one.module or type(model).__name__,
                    f"{one}, {_CONSEQUENCE.get(one.kind, 'which no rule has reached')}",
                ] = None
        return list(missing)

    def _acts(self, finding: Finding) -> bool:
        """Whether what was found concerns the rules that were asked for."""
        part = PART_OF.get(finding.kind)
        if part is not None:
            return self._wanted[part]
        return finding.kind in ("dropout", STOPS) or any(self._wanted.values())

    def _reached_since(self, before: dict[int, int]) -> frozenset[tuple[Part, str, str]]:
        return frozenset(
            (row.part, row.module, row.recognised)
            for row in self._report.applications
            if row.calls != before.get(id(row), 0)
        )


#: What follows from a finding, by its kind; every other is one that no rule has reached.
_CONSEQUENCE = {
    "dropout": "acts: call model.eval(), attributions are deterministic",
    **dict.fromkeys((NO_GATE, NO_NORM), "which no rule is about, and one has acted on it"),
    STOPS: "so that what flows through it would be left out",
    "opaque operator": "which another library computes, so that no rule can be seen to act in it",
    "tensor written out of sight": "by code that calls no operator of torch, or on another thread, so that no rule can "
    "be seen to act in it",
}


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
        tuple(map(_hook, nn.modules.module._global_forward_hooks.values())),
        tuple(map(_hook, nn.modules.module._global_forward_pre_hooks.values())),
        tuple(map(_kind_of_module, anatomy.of(module).modules.values())),
    )


def _kind_of_module(module: nn.Module) -> Any:
    before, after, held = module._forward_pre_hooks, module._forward_hooks, module._parameters
    forward = original_forward(module)
    forward = getattr(forward, "__func__", forward)
    return (
        type(module),
        getattr(forward, "__code__", None) or id(forward),
        tuple(map(_hook, (*after.values(), *before.values()))) if before or after else (),
        # A traced module has its parameters elsewhere.
        tuple([_kind_of_weight(one) for one in held.values() if one is not None]) if held else (),
        _simple(module),
    )


def _kind_of_weight(weight: torch.Tensor) -> Any:
    """A quantised one is run by what it keeps beside itself, and some are packed anew for inference."""
    beside = vars(weight)
    if not beside:
        return weight.dtype, weight.requires_grad
    kept = [(name, _simple(one)) for name, one in beside.items() if hasattr(one, "__dict__")]
    return (weight.dtype, weight.requires_grad, *_simple(weight), *kept)


def _hook(hook: Any) -> Any:
    """A hook by its code and by the kind of what it was made with, since many are made anew for each forward."""
    given: list[Any] = []
    while isinstance(hook, functools.partial):
        given += [*hook.args, *hook.keywords.values()]
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    given += [getattr(hook, "__self__", None), *(getattr(function, "__defaults__", None) or ())]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty one
            given.append(cell.cell_contents)
    switches = [(name, one) for name, one in getattr(hook, "__dict__", {}).items() if isinstance(one, bool | str)]
    return (code_of(hook), type(hook), *switches, *[code_of(one) or _sketch(one) for one in given])


def _simple(thing: Any) -> tuple[Any, ...]:
    """The switches that an object holds."""
    return tuple([(name, value) for name, value in vars(thing).items() if type(value) in _SIMPLE])


def _sketch(argument: Any) -> Any:
    """What of an argument may decide which code runs."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, argument.dim(), argument.requires_grad, 1 in argument.shape)
    return argument if argument is None or isinstance(argument, bool | str) else type(argument)
