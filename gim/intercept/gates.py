"""What stands before the ``forward`` of a module while a session is open, and how a module is put back as it was."""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gim.intercept.frames import Frame, running

if TYPE_CHECKING:
    from gim.intercept.session import Session, Stack

#: Attribute of a changed ``forward`` that holds the one before.
CHANGED = "_gim_before"


#: A call of a module, and the functions in it, which run its hooks and, between them, its ``forward``.
CALL = nn.Module._call_impl.__code__
CALLING = {CALL, *(one for one in CALL.co_consts if isinstance(one, types.CodeType))}


class Gate:
    """Stands before the ``forward`` of one module and says that it runs.

    It is an attribute of the instance. A copy or a pickle of the module gets the module's own ``forward`` in its place;
    a shallow copy, which holds what its original holds, gets it once it is called.
    """

    def __init__(self, module: nn.Module, name: str, stack: Stack) -> None:
        self.name = name
        self.stack = stack
        self.module = module
        own = self.own = module.__dict__.get("forward")
        # A copy that was made inside a context has its class's own here, which says nothing and need not stay.
        if isinstance(own, types.MethodType) and own.__self__ is module and own.__func__ is type(module).forward:
            self.own = None
        #: Whether its stack has taken it away.
        self.gone = False
        #: The module's own, whatever gates of other stacks stand before it.
        self.inner: Callable[..., Any] = module.forward if self.own is None else original_forward(module)
        self.prepare = None if stack.prepare is None else stack.prepare(module)
        #: Whether the module holds no other, and may be a norm by itself.
        self.leaf = not module._modules and self.prepare is None

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.inner

    @property
    def __code__(self) -> Any:
        """What torch.export reads before it calls a model."""
        return self.inner.__code__

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        caller = sys._getframe(1)
        called = caller.f_locals["self"] if caller.f_code in CALLING else self.module
        if called is not self.module and self._is_held_by_copy(called):
            leave(called, self)
            return called.forward(*inputs, **named)
        if self.gone:
            leave(self.module, self)
            return (self.inner if self.own is None else self.own)(*inputs, **named)
        frames = running.frames
        if type(self.own) is not Gate and frames and frames[-1].session.stack is self.stack:
            return self.within(frames[-1].session, inputs, named)  # a part of what runs
        gate, session = self._followed()
        if session is None:
            return self.inner(*inputs, **named)
        if not any(one.session is session for one in reversed(frames)):
            return gate.stack.run(session, gate, inputs, named)
        return gate.within(session, inputs, named)

    def _is_held_by_copy(self, module: nn.Module) -> bool:
        """Whether a module is a shallow copy of the gate's, which has its hooks in common with it."""
        return module.__dict__.get("forward") is self and module._forward_hooks is self.module._forward_hooks

    def _followed(self) -> tuple[Gate, Session | None]:
        """Of the gates before one module, that of the session which was opened last, and the session: one that runs on
        this thread, else one that a forward here and now would follow."""
        best: tuple[Gate, Session | None] = (self, None)
        gate: Any = self
        while isinstance(gate, Gate):
            ran = (one.session for one in reversed(running.frames) if one.session.stack is gate.stack)
            session = next(ran, None) or gate.stack.innermost()
            if session is not None and (best[1] is None or session.number > best[1].number):
                best = gate, session
            gate = gate.own
        return best

    def within(self, session: Session, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run the module in a forward pass that follows a session, as the innermost that runs on this thread."""
        frame = Frame(session, self.name, self.module)
        if session.recording and not torch.is_grad_enabled():
            session.check_no_graph(frame)
        session.ran.add(self.name)
        alone = self.leaf and len(inputs) == 1 and not named
        run = self.stack.leaf(self, frame, inputs[0]) if alone else self.inner
        running.frames.append(frame)
        try:
            if self.prepare is not None:
                inputs, named = self.prepare(frame, inputs, named)
            return run(*inputs, **named)
        finally:
            running.frames.pop()

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


def interrupted(error: BaseException, stack: Stack) -> set[str]:
    """Names of the modules of a stack that were running when an error was raised."""
    names, traceback = set[str](), error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code is Gate.within.__code__ and frame.f_locals["self"].stack is stack:
            names.add(frame.f_locals["self"].name)
        traceback = traceback.tb_next
    return names


def gate_of(module: nn.Module, stack: Stack | None = None) -> Gate | None:
    """The gate before a module's ``forward``, of one stack or any, also behind what a memory plan has put there."""
    found = module.__dict__.get("forward")
    while found is not None:
        if not isinstance(found, Gate):
            found = getattr(found, "__dict__", {}).get(CHANGED)
        elif stack is None or found.stack is stack:
            return found
        else:
            found = found.own
    return None


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's own ``forward``, without what stands before it."""
    forward: Any = module.forward
    while not isinstance(forward, Gate):
        before = getattr(forward, "__dict__", {}).get(CHANGED)
        if before is None:
            return forward
        forward = before
    return forward.inner


class Changes:
    """Changes of instances, each put back exactly as it was on closing, or once nobody holds this any more.

    Args:
        session: what the changed forwards are for: a forward pass that follows another, on another thread, sees none
            of them.
    """

    def __init__(self, session: Session | None = None) -> None:
        self._session = session
        self._undo: list[Callable[[], Any]] = []
        weakref.finalize(self, undo_all, self._undo)

    def callback(self, undo: Callable[[], Any]) -> None:
        """Call something on closing; it may be called twice."""
        self._undo.append(undo)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on the instance alone, to be put back exactly as it was, or removed."""
        before = module.__dict__.get(name, _MISSING)
        self.callback(lambda: put_back(module, name, before))
        module.__dict__[name] = value

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give one instance another ``forward``."""
        inner, session = module.forward, self._session

        @functools.wraps(inner)
        def changed(*inputs: Any, **named: Any) -> Any:
            ours = session is None or session.is_followed_here()
            return (forward if ours else inner)(*inputs, **named)

        changed.__dict__[CHANGED] = inner
        self.set_attribute(module, "forward", changed)

    def close(self) -> None:
        """Undo every change, the last first."""
        undo_all(self._undo)


def undo_all(held: list[Callable[[], Any]]) -> None:
    """Call each, the last first, and hold it no more; what is interrupted is done again."""
    interrupted: KeyboardInterrupt | None = None
    while held:
        try:
            while held:
                held[-1]()
                held.pop()
        except KeyboardInterrupt as error:  # the model is put back first
            interrupted = error
    if interrupted is not None:
        try:
            raise interrupted
        finally:
            del interrupted  # or it and this frame would keep each other, and all that the frames before hold


_MISSING = object()


def take_away(held: weakref.ref[Gate]) -> None:
    """Take a gate away that its stack does not need any more; under another forward, a plan's or the user's own, it
    stays, and is no more once that is put back."""
    gate: Any = held()
    if gate is None:
        return
    gate.gone = True
    top = gate.module.__dict__.get("forward")
    if top is gate:
        put_back(gate.module, "forward", gate)
        return
    while isinstance(top, Gate) and top.own is not gate:
        top = top.own
    if isinstance(top, Gate):
        top.own = gate.own


def leave(module: nn.Module, gate: Gate) -> None:
    """Take a gate away where it stands before a module that it is not for, or not any more."""
    if module.__dict__.get("forward") is gate:
        own: Any = gate
        while isinstance(own, Gate) and (own.gone or own.module is not module):
            own = own.own
        put_back(module, "forward", _MISSING if own is None else own)


def put_back(module: nn.Module, name: str, before: Any) -> None:
    """Give an instance the attribute that it had, or none; of a gate that is gone, what stood behind it."""
    while isinstance(before, Gate) and before.gone:
        before = _MISSING if before.own is None else before.own
    if before is _MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before
