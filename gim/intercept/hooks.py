"""Whose code runs: the model's, or a hook's that the user has put on a module.

What a hook computes on the way is the user's own: it is no part of the model, and no rule is about it. torch runs the
hooks of a module in the module's call and beside its ``forward``, before which a gate stands.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from torch import nn

from gim.intercept.gates import CALL, CALLING, Gate, gate_of

_FORWARD = Gate.__call__.__code__


def hooked() -> bool:
    """Whether a hook runs: a module is being called, and what it runs is not behind its gate.

    Before some modules no gate stands: one that is made on the way, one whose ``forward`` has just been set. There, a
    hook is what the module knows as one.
    """
    frame: FrameType | None = sys._getframe(1)
    ran: CodeType | None = None
    while frame is not None and frame.f_code is not _FORWARD:
        if frame.f_code not in CALLING:
            ran = frame.f_code
        elif frame.f_code is CALL:
            module = frame.f_locals["self"]
            if gate_of(module) is not None or _begins_a_hook(module, ran):
                return True
        frame = frame.f_back
    return False


def _begins_a_hook(module: nn.Module, code: CodeType | None) -> bool:
    """Whether a function that is a hook of a module begins with some code. The watch asks this in a way of its own."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return code is not None and any(getattr(getattr(one, "__func__", one), "__code__", None) is code for one in hooks)
