"""Whose code called an operator under the watch, read from Python's own stack."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

#: A call of a module.
_CALL = nn.Module._call_impl.__code__
#: What runs hooks, and ``forward`` between them: the call itself and the functions in it.
_CALLING = {_CALL, *(one for one in _CALL.co_consts if isinstance(one, CodeType))}


class Callers:
    """The code of a model's modules, of hooks on them, and of what they call.

    Args:
        modules: of the model, by name, itself under the empty one.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._names = {id(module): name or type(module).__name__ for name, module in modules.items()}

    def is_hook(self) -> bool:
        """Whether a hook on a module runs. What cannot be told to be one is the module's own code."""
        ran: CodeType | None = None
        for frame in _stack():
            if frame.f_code not in _CALLING:
                ran = frame.f_code
            elif frame.f_code is _CALL and id(module := frame.f_locals["self"]) in self._names:
                return ran is not None and any(ran is code_of(hook) for hook in _hooks(module))
        return False

    def where(self) -> tuple[str, str]:
        """Name of the module whose code runs, and ``file.py:123`` of what it runs outside torch and this package."""
        place, module = "", ""
        for frame in _stack():
            home = frame.f_globals.get("__name__", "").split(".")
            if not place and home[0] not in ("torch", "gim"):
                place = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
            module = module or self._names.get(id(frame.f_locals.get("self")), "")
            if place and module:
                break
        return module, place


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    yield from torch_module._global_forward_pre_hooks.values()
    yield from torch_module._global_forward_hooks.values()


def code_of(hook: Any) -> CodeType | None:
    """The code that a call of a hook begins with."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    code: CodeType | None = getattr(function, "__code__", None) or getattr(type(hook).__call__, "__code__", None)
    return code
