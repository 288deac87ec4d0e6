"""The one way in: a function mode that is on while a model runs, with one table from operation to handler.

No function of torch is replaced. Each call that the model's code makes of a function in the table goes to its handler,
on this thread and for this forward pass only; everything else passes by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gim.intercept import activations, attention, checkpoints, norms, products
from gim.intercept.session import Session, running

#: What is done with each function of torch that a module of the model calls.
HANDLERS: dict[Any, Callable[..., Any]] = {
    **attention.HANDLERS,
    **norms.HANDLERS,
    **products.HANDLERS,
    **activations.HANDLERS,
}


class Mode(TorchFunctionMode):
    """Sends the calls that a model's modules make to the functions of :data:`HANDLERS`."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is None:
            return func(*args, **named)
        frames = running.frames
        if not frames or frames[-1].session is not self.session:
            return func(*args, **named)
        if torch.is_grad_enabled():
            checkpoints.follow(self.session)
        return handler(self.session, func, *args, **named)
