"""Checkpoints of the user's own: what they run again in the backward follows the rules of its forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from gim.intercept.frames import Frame, running
from gim.intercept.session import Session


def follow(session: Session, frame: Frame) -> None:
    """Where a checkpoint saves what runs now, let its second run be under the session's rules too; ``frame`` is of what
    runs where nothing runs around it."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return
    closure = getattr(hooks[0], "__closure__", None)
    if closure is None or "_checkpoint_hook" not in hooks[0].__qualname__:
        return
    for cell in closure:
        held = cell.cell_contents
        recompute = getattr(held, "recompute_fn", None)
        if recompute is not None and not isinstance(recompute, Again):
            outer = running.frames[-1] if running.frames else frame
            held.recompute_fn = Again(session, recompute, outer.name, outer.module)


@dataclass(eq=False)
class Again:
    """A second run in the backward, under the session of the first; an error once that has closed."""

    session: Session
    run: Callable[..., Any]
    name: str
    module: nn.Module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        refuse_when_closed(self.session, self.name)
        if any(frame.session is self.session for frame in running.frames):
            return self.run(*inputs, **named)
        # The backward of a GPU runs on a thread of its own, which has opened no session.
        return self.session.inside(self.name, self.module, lambda _: self.run(*inputs, **named))


def refuse_when_closed(session: Session, name: str) -> None:
    """An error once a session has closed: what runs again would follow no rule.

    Raises:
        RuntimeError: it has.
    """
    if session.closed:
        raise RuntimeError(
            f"{name}: a checkpoint runs this layer again after its GIM context has closed: call backward() "
            "inside the context"
        )


def refuse_reentrant(session: Session, frame: Frame) -> None:
    """An error in the first run of a reentrant checkpoint, whose second cannot be told from another forward.

    Raises:
        UnsupportedModelError: it is one, and the session is strict.
    """
    caller: FrameType | None = sys._getframe()
    while caller is not None and caller.f_code is not CheckpointFunction.forward.__code__:
        caller = caller.f_back
    if caller is not None:
        running.frames.append(frame)
        try:
            session.refuse(
                "runs in a reentrant checkpoint, whose second run would follow no rule once the context has closed, "
                "or on another thread: pass use_reentrant=False"
            )
        finally:
            running.frames.pop()
