"""Sessions: which rules a forward pass follows, on which thread and in which task.

A model has a stack of open sessions. Each of its modules gets a gate in front of its ``forward``, which says that the
module runs; the outermost turns the function mode on, for that call and on that thread only. A forward pass follows the
innermost session that its own task or thread has opened, and none where it has opened none.
"""

from __future__ import annotations

import functools
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gim.applied import Application, AppliedReport, Part, UnsupportedModelError
from gim.intercept import compiled
from gim.intercept.frames import Frame, in_backward, opened, running
from gim.intercept.gates import Gate, gate_of, take_away, undo_all
from gim.rules import Rules
from gim_kernels.types import Engine

_numbers = itertools.count(1)


class _Lives:
    """Is held by a node of the graph."""


@dataclass(eq=False, repr=False)
class Session:
    """Rules, report and what ran of one context over one model.

    Args:
        rules: what the backward does.
        strict: whether a part that is not covered is an error.
        stack: of the model.
        engine: which engine the operators are asked for.
    """

    rules: Rules
    strict: bool
    stack: Stack
    engine: Engine = "auto"
    closed: bool = False
    #: Of those opened in this process, the how manieth it is.
    number: int = 0
    #: Whether forward passes are watched; those of an estimate, without numbers, are not.
    proves: bool = True
    #: Whether the outermost module that runs began with gradients on.
    recording: bool = False
    #: Says what of a forward pass no rule has reached.
    proof: Any = None
    #: How a module that runs without a graph inside a forward with one is looked at.
    check_no_graph: Callable[[Frame], None] = lambda _: None
    #: Which function of torch the code of which class called in the forward pass.
    called: set[tuple[type, Any]] = field(default_factory=set)
    #: Names of the modules that ran in the forward pass.
    ran: set[str] = field(default_factory=set)
    #: What forward passes that an error ended had left unreached by then.
    early: list[tuple[str, str]] = field(default_factory=list)
    #: Whether an error has ended one, and how many came to their end.
    stopped: bool = False
    passes: int = 0
    #: How often a rule was applied, second runs of checkpoints included, and what was applied last.
    fired: int = 0
    last: Application | None = None
    #: Gates of activations that the kernels have, by the ids of their outputs.
    activated: dict[int, Any] = field(default_factory=dict)
    #: Is shown each call of the attention interface: the module, then query ``[B, HQ, T, D]``, key, value and
    #: output ``[B, T, HQ, D]``; None where nobody asks.
    see_attention: Callable[..., None] | None = None
    #: Is given each attention's output ``[B, HQ, T, D]``, and gives it back; None where nobody asks.
    see_heads: Callable[[torch.Tensor], torch.Tensor] | None = None
    #: Is shown the whole numbers by which the model's code looks up rows; None where nobody asks.
    see_lookup: Callable[[torch.Tensor], None] | None = None

    def __post_init__(self) -> None:
        self.report = AppliedReport(rules=self.rules.describe())
        self._rows: dict[tuple[Part, str, str], Application] = {}
        self._waiting: dict[int, tuple[str, weakref.ref[_Lives]]] = {}

    def open(self) -> None:
        """Be the innermost session of this task or thread."""
        self.number = next(_numbers)
        compiled.begin(self)
        self.stack.sessions.append(self)
        opened.set((*opened.get(), self))

    def close(self) -> None:
        """Be no session any more; from now on nothing follows it."""
        self.closed = True
        opened.set(tuple(one for one in opened.get() if one is not self))
        self.stack.forget(self)
        compiled.end(self)

    def is_followed_here(self) -> bool:
        """Whether a forward pass of the model, here and now, follows this session."""
        frames = running.frames
        if frames:
            return any(frame.session is self for frame in frames)
        return self.stack.innermost() is self

    def fire(self, part: Part, how: str, engine: str = "torch", rule: str = "") -> None:
        """Count one application of a rule in the module that runs, by the engine that said it ran.

        A checkpoint runs its modules a second time inside the backward; that is the same application, not another.
        """
        self.fired += 1
        frame = running.frames[-1]
        row = self._rows.get((part, frame.name, how))
        if row is None:
            rule = rule or self.rules.of_part(part)
            row = Application(part, frame.name, type(frame.module).__name__, rule, how)
            self._rows[part, frame.name, how] = row
            self.report.applications.append(row)
            self.report.found(part)
        self.last = row
        if not in_backward():
            row.calls += 1
            row.engine = engine

    def expect_values(self, number: int, weights: torch.Tensor) -> None:
        """Remember that attention weights, which have that number, are yet to meet their values.

        What is put beside their node in the graph is gone where they were made to be shown, and nothing leads to them.
        """
        node: Any = weights.grad_fn
        if node is not None:
            lives = node.metadata[Session] = _Lives()
            self._waiting[number] = str(running.frames[-1]), weakref.ref(lives)

    def met(self, weights: tuple[int, ...]) -> None:
        """Attention weights, which have these numbers, have met their values."""
        for number in weights:
            self._waiting.pop(number, None)

    def heads(self, out: torch.Tensor) -> torch.Tensor:
        """The output of an attention that runs, shown to whoever asks."""
        return out if self.see_heads is None else self.see_heads(out)

    def without_values(self, but: Collection[str] = ()) -> list[tuple[str, str]]:
        """Name and reason of attention whose weights met no values, since this was last asked, but in some modules."""
        waiting, self._waiting = self._waiting, {}
        if self.rules.v_scale == 1.0:
            return []
        reason = "brings its attention weights to its values in a way that gim does not know, so v_scale is not applied"
        names = dict.fromkeys(name for name, lives in waiting.values() if lives() is not None)
        return [(name, reason) for name in names if name not in but]

    def ended(self, error: BaseException, missing: list[tuple[str, str]]) -> None:
        """Report what a forward pass that an error ended had left unreached; where strict, it is raised on closing."""
        self.stopped = True
        self.report.note(f"a forward pass was ended by {type(error).__name__}: only what ran before was looked at")
        self.early += missing
        self.report.leave_out(missing)

    def rename(self, row: Application, how: str) -> None:
        """Say in other words how a part was recognised."""
        self._rows[row.part, row.module, how] = self._rows.pop((row.part, row.module, row.recognised))
        row.recognised = how

    def refuse(self, reason: str, because: Exception | None = None) -> None:
        """Raise where the session is strict, naming the module that runs; else report.

        Raises:
            UnsupportedModelError: the session is strict.
        """
        name = str(running.frames[-1])
        if self.strict:
            raise UnsupportedModelError(f"{name}: {reason}") from because
        self.report.leave_out([(name, reason)])

    def add_unsupported(self, missing: list[tuple[str, str]]) -> None:
        """Raise where the session is strict and something is missing, naming all of it; else report.

        Raises:
            UnsupportedModelError: the session is strict.
        """
        if missing and self.strict:
            shown = "\n".join(f"  {name}: {reason}" for name, reason in missing[:8])
            more = f"\n  and {len(missing) - 8} more" if len(missing) > 8 else ""
            model = self.stack.model()
            raise UnsupportedModelError(
                f"{type(model).__name__} is not fully covered by the rules that were asked for:\n{shown}{more}\n"
                "Switch off the rule, or pass strict=False to have this reported instead."
            )
        self.report.leave_out(missing)

    def note(self, what: str) -> None:
        """Write something of the module that runs into the report's notes, once for all modules of its class."""
        self.report.note(f"{type(running.frames[-1].module).__name__} {what}")

    def inside(self, name: str, module: nn.Module, call: Callable[[Frame], Any]) -> Any:
        """What ``call`` gives while the session's rules are in force on this thread and ``module`` is what runs.

        However it ends, an interrupt at any instruction included, the thread is as it was.
        """
        from gim.intercept.mode import Mode

        frames, token = running.frames, object()
        depth, modes = len(frames), torch._C._len_torch_function_stack()
        recording = self.recording

        def restore() -> None:
            del frames[depth:]
            while torch._C._len_torch_function_stack() > modes:
                torch._C._pop_torch_function_stack()
            self.stack.leave(token)
            self.recording = recording

        try:
            try:
                self.recording = torch.is_grad_enabled()
                self.stack.enter(token)
                torch._C._push_on_torch_function_stack(Mode(self))
                frame = Frame(self, name, module)
                frames.append(frame)
                return call(frame)
            finally:
                restore()
        finally:
            restore()  # where an interrupt came during the first


class Stack:
    """The open sessions of one model, and the gates of its modules while there are any.

    ``enter`` and ``leave`` are called around a forward pass, with what tells it from others; ``leave`` may be called
    again. ``prepare`` makes what a module's call needs besides, and ``configs`` are those that then say ``"gim"``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.sessions: list[Session] = []
        self.modules: Mapping[str, nn.Module] = {}
        self.configs: dict[int, Any] = {}
        self.enter: Callable[[object], None] = lambda _: None
        self.leave: Callable[[object], None] = lambda _: None
        #: One plan at a time changes the model's instances.
        self.exclusive = threading.RLock()
        self.prepare: Callable[[nn.Module], Any] | None = None
        #: Called with the session, the outermost gate and the arguments of its call, and what calls it.
        self.run: Callable[..., Any]
        #: Given the gate of a module that holds no other, its frame and its one argument: what runs for its forward.
        self.leaf: Callable[[Gate, Frame, Any], Callable[..., Any]]
        self._undo: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    def innermost(self) -> Session | None:
        """The session that a forward pass here and now follows."""
        return next((one for one in reversed(opened.get()) if one.stack is self and not one.closed), None)

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Put a gate before every module of the model, by name, that has none of this stack."""
        self.modules = modules
        with self._lock:
            for name, module in modules.items():
                gate = gate_of(module, self)
                if gate is None:
                    gate = module.__dict__["forward"] = Gate(module, name, self)
                    self._undo.append(functools.partial(take_away, weakref.ref(gate)))
                gate.name = name

    def consists_of(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether these, by name, are the modules that have gates."""
        return self.modules.keys() == modules.keys() and all(map(operator.is_, self.modules.values(), modules.values()))

    def forget(self, session: Session | None = None) -> None:
        """Leave out a session, and take the gates away with the last."""
        with self._lock:
            self.sessions[:] = [one for one in self.sessions if one is not session and not one.closed]
            if not self.sessions:
                self.modules, self.configs = {}, {}
                undo_all(self._undo)


_stacks: weakref.WeakKeyDictionary[nn.Module, Stack] = weakref.WeakKeyDictionary()
_stacks_lock = threading.Lock()


def stack_of(model: nn.Module) -> Stack:
    """The stack of a model."""
    with _stacks_lock:
        found = _stacks.get(model)
        if found is None:
            found = _stacks[model] = Stack(model)
        return found


def session_of(model: nn.Module) -> Session | None:
    """The session that a forward pass of a model would follow here and now."""
    with _stacks_lock:
        found = _stacks.get(model)
    return None if found is None else found.innermost()
