"""Rows that the model's code looks up by numbers: its ids may have other tables than the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept.session import Session


def _by_first(session: Session, func: Callable[..., Any], index: torch.Tensor, *args: Any, **named: Any) -> Any:
    _show(session, index)
    return func(index, *args, **named)


def _by_last(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    _show(session, named.get("index", args[-1]), args[0])
    return func(*args, **named)


def _show(session: Session, index: Any, table: torch.Tensor | None = None) -> None:
    if session.see_lookup is None or (table is not None and not table.is_floating_point()):
        return
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, torch.Tensor) and not one.is_floating_point():
            session.see_lookup(one)


HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.embedding, F.embedding_bag, F.one_hot), _by_first),
    **dict.fromkeys((torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select), _by_last),
}
