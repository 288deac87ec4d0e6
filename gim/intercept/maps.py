"""Linear maps, whose weights tell one from another: one map of one value is one value, however often it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept import flow
from gim.intercept.session import Session


def _linear(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    out = func(*args, **named)
    flow.tell_weight(out, args[:2] if len(args) > 1 else (*args, named["weight"]), "linear")
    return out


def _convolution(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    out = func(*args, **named)
    flow.tell_weight(out, args[:2], func.__name__, *map(str, args[3:]), *map(str, named.items()))
    return out


def _addmm(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    out = func(*args, **named)
    flow.tell_weight(out, args[1:3], "addmm", *map(str, named.items()))
    return out


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.mv, torch.Tensor.mv),
        _convolution,
    ),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
}
