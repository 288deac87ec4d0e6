"""The one way in: a function mode that is on while a model runs, with one table from operation to handler.

No function of torch is replaced. Each call that the model's code makes of a function in the table goes to its handler,
on this thread and for this forward pass only; everything else passes by, and so does what a user's hook computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gim.intercept import activations, checkpoints, flex, lookups, maps, norms, products, softmax, torch_attention
from gim.intercept.frames import running
from gim.intercept.hooks import hooked
from gim.intercept.session import Session

#: What is done with each function of torch that a module of the model calls.
HANDLERS: dict[Any, Callable[..., Any]] = {
    **torch_attention.HANDLERS,
    **flex.HANDLERS,
    **maps.HANDLERS,
    **softmax.HANDLERS,
    **norms.HANDLERS,
    **products.HANDLERS,
    **activations.HANDLERS,
    **lookups.HANDLERS,
}


#: What torch calls the tensors that its functions begin with.
_FIRST = (("input",), ("other", "mat1", "mat2", "tensor1", "end", "vec"), ("tensor2", "mat2", "weight"))


#: What code may call or not without computing other numbers.
_TELLING_NOTHING = frozenset(["__get__", "__set__", "_set_grad_enabled", "empty"])


def _by_place(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's tensors by their place, where the model gives some of them by name."""
    rest = dict(named)
    for names in _FIRST[len(args) :]:
        name = next((name for name in names if name in rest), None)
        if name is None:
            break
        args = (*args, rest.pop(name))
    return args, rest


class Mode(TorchFunctionMode):
    """Sends the calls that a model's modules make to the functions of :data:`HANDLERS`."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self._frames = running.frames  # of the one thread that it is on
        #: Code of this package that has called functions in a module's place, as memory plans do.
        self._ours: set[CodeType] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        frame = self._frames[-1] if self._frames else None
        if frame is None or frame.session is not self.session:
            return func(*args, **named)
        call, called = (type(frame.module), func), self.session.called
        if call not in called and func.__name__ not in _TELLING_NOTHING:
            caller = sys._getframe(1)
            if caller.f_code not in self._ours:
                if caller.f_globals.get("__name__", "").startswith("gim."):
                    self._ours.add(caller.f_code)
                else:
                    called.add(call)
        handler = HANDLERS.get(func)
        if handler is None or hooked():
            out = func(*args, **named)
        else:
            if torch.is_grad_enabled():
                checkpoints.follow(self.session, frame)
            places, rest = _by_place(args, named) if named else (args, named)
            out = handler(self.session, func, *places, **rest)
        if frame.trace is not None:
            frame.trace.add(func, args, named, out)
        return out
