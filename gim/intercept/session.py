"""Sessions: which rules a forward pass follows, on which thread and in which task.

A model has a stack of open sessions. Each of its modules gets a gate in front of its ``forward``, which says that the
module runs; the outermost turns the function mode on, for that call and on that thread only. A forward pass follows the
innermost session that its own task or thread has opened, and none where it has opened none.
"""

from __future__ import annotations

import contextvars
import copy
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gim.applied import Application, AppliedReport, Part, UnsupportedModelError
from gim.rules import Rules

#: The sessions that this task or thread has opened, the innermost last.
_open: contextvars.ContextVar[tuple[Session, ...]] = contextvars.ContextVar("gim_sessions", default=())


class Frame:
    """A module that runs inside a session."""

    __slots__ = ("counted", "module", "name", "pattern", "session", "sources")

    def __init__(self, session: Session, name: str, module: nn.Module) -> None:
        self.session = session
        self.name = name
        self.module = module
        #: What the mask argument of this module means, where the module itself must not see it.
        self.pattern: Any = None
        #: Whether a gated product of this call is counted already: experts are products of one module.
        self.counted = False
        #: What activations were computed from, by place; kept only where a rule asks for it.
        self.sources: dict[Any, torch.Tensor] = {}


class _Running(threading.local):
    """The modules that run on this thread, the outermost first."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []


running = _Running()


class Session:
    """Rules, report and what ran of one context over one model.

    Args:
        rules: what the backward does.
        strict: whether a part that is not covered is an error.
        stack: of the model.
    """

    def __init__(self, rules: Rules, strict: bool, stack: Stack) -> None:
        self.rules = rules
        self.strict = strict
        self.stack = stack
        self.report = AppliedReport(rules=rules.describe())
        self.closed = False
        #: Whether the outermost module that runs began with gradients on.
        self.recording = False
        #: How a module that runs without a graph inside a forward with one is looked at.
        self.check_no_graph: Callable[[Frame], None] = lambda _: None
        #: How often a rule was applied, second runs of checkpoints included.
        self.fired = 0
        self._rows: dict[tuple[Part, str], Application] = {}
        #: Gates of activations that the kernels have, by the ids of their outputs.
        self.activated: dict[int, Any] = {}

    def open(self) -> None:
        """Be the innermost session of this task or thread."""
        self.stack.sessions.append(self)
        _open.set((*_open.get(), self))

    def close(self) -> None:
        """Be no session any more; from now on nothing follows it."""
        self.closed = True
        _open.set(tuple(one for one in _open.get() if one is not self))
        self.stack.forget(self)

    def fire(self, part: Part, rule: str, how: str, engine: str) -> None:
        """Count one application of a rule in the module that runs.

        A checkpoint runs its modules a second time inside the backward; that is the same application, not another.
        """
        self.fired += 1
        frame = running.frames[-1]
        row = self._rows.get((part, frame.name))
        if row is None:
            row = Application(part, frame.name, type(frame.module).__name__, rule, how)
            self._rows[part, frame.name] = row
            self.report.applications.append(row)
            self.report.found(part)
        if torch._C._current_graph_task_id() == -1:
            row.calls += 1
            row.engine = engine

    def refuse(self, reason: str, because: Exception | None = None, kind: type[Exception] | None = None) -> None:
        """Raise where the session is strict, naming the module that runs; else report.

        Raises:
            UnsupportedModelError: the session is strict.
        """
        frame = running.frames[-1]
        name = frame.name or type(frame.module).__name__
        if self.strict:
            raise (kind or UnsupportedModelError)(f"{name}: {reason}") from because
        if (name, reason) not in self.report.unsupported:
            self.report.unsupported.append((name, reason))

    def note(self, what: str) -> None:
        """Write something of the module that runs into the report's notes, once for all modules of its class."""
        text = f"{type(running.frames[-1].module).__name__} {what}"
        if text not in self.report.notes:
            self.report.notes.append(text)

    @contextmanager
    def entered(self, name: str, module: nn.Module) -> Iterator[Frame]:
        """Inside, the session's rules are in force on this thread, and ``module`` is what runs."""
        from gim.intercept.mode import Mode

        frame = Frame(self, name, module)
        self.recording = torch.is_grad_enabled()
        with ExitStack() as inside:
            for around in self.stack.around:
                inside.enter_context(around())
            inside.enter_context(Mode(self))
            running.frames.append(frame)
            try:
                yield frame
            finally:
                running.frames.pop()


class Gate:
    """Stands before the ``forward`` of one module and says that it runs.

    It is an attribute of the instance. A copy or a pickle of the module gets the module's own ``forward`` in its place.
    """

    def __init__(self, module: nn.Module, name: str, stack: Stack) -> None:
        self.name = name
        self.stack = stack
        self.module = module
        self.own = module.__dict__.get("forward")
        self.inner: Callable[..., Any] = module.forward
        self.prepare = stack.prepare(name, module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.inner

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        frames = running.frames
        session = frames[-1].session if frames else None
        if session is None or session.stack is not self.stack:
            session = next((one.session for one in reversed(frames) if one.session.stack is self.stack), None)
        if session is None:
            session = self.stack.innermost()
            if session is None:
                return self.inner(*inputs, **named)
            return self.stack.run(session, self, inputs, named)
        frame = Frame(session, self.name, self.module)
        if session.recording and not torch.is_grad_enabled():
            session.check_no_graph(frame)
        if self.prepare is not None:
            return self.prepare(frame, self.inner, inputs, named)
        frames.append(frame)
        try:
            return self.inner(*inputs, **named)
        finally:
            frames.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        copied = memo.get(id(self.module))
        return self.inner if copied is None else types.MethodType(type(self.module).forward, copied)

    def __reduce__(self) -> Any:
        if self.own is not None:
            return _itself, (self.own,)
        return getattr, (self.module, "forward")


def _itself(x: Any) -> Any:
    return x


class Stack:
    """The open sessions of one model, and the gates of its modules while there are any.

    ``around`` makes what is entered while a forward pass runs; ``prepare`` what a module's call needs besides.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.sessions: list[Session] = []
        self.around: list[Callable[[], AbstractContextManager[Any]]] = []
        self.prepare: Callable[[str, nn.Module], Any] = lambda *_: None
        #: Called with the session, the outermost gate and the arguments of its call, and what calls it.
        self.run: Callable[..., Any]
        self._gated: list[weakref.ref[nn.Module]] = []
        self._lock = threading.RLock()

    def innermost(self) -> Session | None:
        """The session that a forward pass here and now follows."""
        return next((one for one in reversed(_open.get()) if one.stack is self and not one.closed), None)

    def install(self) -> None:
        """Put a gate before every module that has none of this stack."""
        model = self.model()
        if model is None:
            return
        with self._lock:
            for name, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule) or self._gate(module) is not None:
                    continue
                self._gated.append(weakref.ref(module))
                module.__dict__["forward"] = Gate(module, name, self)

    def forget(self, session: Session | None = None) -> None:
        """Leave out a session, and take the gates away with the last."""
        with self._lock:
            self.sessions[:] = [one for one in self.sessions if one is not session and not one.closed]
            interrupted: BaseException | None = None
            while not self.sessions and self._gated:
                try:
                    self._remove()
                except KeyboardInterrupt as error:  # the model is put back first
                    interrupted = error
            if interrupted is not None:
                raise interrupted

    def _gate(self, module: nn.Module) -> Gate | None:
        found = module.__dict__.get("forward")
        while isinstance(found, Gate):
            if found.stack is self:
                return found
            found = found.own
        return None

    def _remove(self) -> None:
        while self._gated:
            module = self._gated[-1]()
            gate = None if module is None else self._gate(module)
            if module is not None and gate is not None:
                top = module.__dict__["forward"]
                if top is gate:
                    if gate.own is None:
                        del module.__dict__["forward"]
                    else:
                        module.__dict__["forward"] = gate.own
                else:
                    while top.own is not gate:
                        top = top.own
                    top.own, top.inner = gate.own, gate.inner
            self._gated.pop()


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


def session_here(module: nn.Module) -> Session | None:
    """The session whose rules are in force for a module that runs on this thread."""
    frames = running.frames
    return frames[-1].session if frames else None


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's own ``forward``, without the gates before it."""
    forward = module.forward
    while isinstance(forward, Gate):
        forward = forward.inner
    return forward


class Changes:
    """Changes of instances, each to be put back exactly as it was."""

    def __init__(self) -> None:
        self.undo = ExitStack()

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on the instance alone, to be put back exactly as it was, or removed."""
        before = module.__dict__.get(name, _MISSING)
        module.__dict__[name] = value
        self.undo.callback(_put_back, module, name, before)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one instance another ``forward``."""
        forward.__wrapped__ = module.forward  # type: ignore[attr-defined]
        self.set_attribute(module, "forward", forward)

    def close(self) -> None:
        """Undo every change, the last first."""
        self.undo.close()


_MISSING = object()


def _put_back(module: nn.Module, name: str, before: Any) -> None:
    if before is _MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before
