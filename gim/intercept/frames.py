"""Which module runs on this thread, for which session, and which sessions are open here."""

from __future__ import annotations

import contextvars
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from gim.intercept.session import Session


@dataclass(slots=True, eq=False)
class Frame:
    """A module that runs inside a session."""

    session: Session
    name: str
    module: nn.Module
    #: What the mask argument of this module means, where the module itself must not see it.
    pattern: Any = None
    #: The config that says "sdpa" to this module.
    shows: Any = None
    #: Whether a gated product of this call is counted already: experts are products of one module.
    counted: bool = False
    #: What activations were computed from, and its version then, by place; None where no rule has asked for it.
    sources: dict[Any, tuple[torch.Tensor, int]] | None = None
    #: What notes the functions that this call makes; None where nobody asks.
    trace: Any = None

    def __str__(self) -> str:
        return self.name or type(self.module).__name__


class _Running(threading.local):
    """The modules that run on this thread, the outermost first."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []


running = _Running()
#: The sessions that this task or thread has opened, the innermost last; some may be closed.
opened: contextvars.ContextVar[tuple[Session, ...]] = contextvars.ContextVar("gim_sessions", default=())


def in_backward() -> bool:
    """Whether a backward is running on this thread: what runs now is run again."""
    return torch._C._current_graph_task_id() != -1


class Paused:
    """Inside, the function mode of the session that runs is off: what is called is no code of the model's."""

    def __enter__(self) -> None:
        count = torch._C._len_torch_function_stack()
        top = torch._C._get_function_stack_at(count - 1) if count else None
        self._mode = torch._C._pop_torch_function_stack() if hasattr(top, "session") else None

    def __exit__(self, *error: Any) -> None:
        if self._mode is not None:
            torch._C._push_on_torch_function_stack(self._mode)
