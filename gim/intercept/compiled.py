"""Code that was given to ``torch.compile`` runs as it was written where a session is open.

Compiled code calls no function that a rule could be seen to reach, and what it was compiled from may hold anything.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import eval_frame

from gim.intercept.frames import opened, running


class _Stance:
    """What ``torch.compiler.set_stance`` sets: "force_eager" to a task or thread with an open session, else as before.

    Args:
        before: what was set.
    """

    def __init__(self, before: Any) -> None:
        self.before = before

    @property
    def stance(self) -> str:
        here = running.frames or any(not session.closed for session in opened.get())
        stance: str = "force_eager" if here else self.before.stance
        return stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.before, name)


_lock = threading.RLock()  # a dropped session may end while another begins
#: The sessions that are open anywhere: the first of them sets the stance, the last puts it back. torch's own setter is
#: not called: it refuses inside of compiled code, where a session that was dropped may end.
_open: set[object] = set()


def begin(session: object) -> None:
    """A session opens."""
    with _lock:
        _open.add(session)
        hold()


def hold() -> None:
    """Set the stance where somebody has set another since."""
    now: Any = eval_frame._stance
    if type(now) is not _Stance:
        eval_frame._stance = _Stance(now)  # type: ignore[assignment]


def end(session: object) -> None:
    """A session has closed; it may be said again."""
    with _lock:
        _open.discard(session)
        now: Any = eval_frame._stance
        if not _open and type(now) is _Stance:
            eval_frame._stance = now.before


def refuse_inside() -> None:
    """An error where what runs here is being compiled.

    Raises:
        RuntimeError: it is.
    """
    if torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() not in (None, False):
        raise RuntimeError(
            "a GIM context cannot be opened in code that torch.compile runs, where no rule would be seen to act: "
            "open it around the call, or leave the function that opens it to torch.compiler.disable"
        )


def refuse_recording() -> None:
    """An error where the forward pass that begins is being recorded, to be run again elsewhere.

    Raises:
        RuntimeError: it is.
    """
    if torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.jit.trace and torch.export cannot record a model inside a GIM context: what they give runs in no "
            "module's forward and would follow its rules in part. Record the model outside"
        )
