"""Linear maps, whose weights tell one from another: one map of one value is one value, however often it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept import flow
from gim.intercept.session import Session


def _linear(session: Session, func: Callable[..., Any], input: Any, *args: Any, **named: Any) -> Any:
    out = func(input, *args, **named)
    flow.tell_weight(out, (input, args[0] if args else named["weight"]), "linear")
    return out


def _convolution(session: Session, func: Callable[..., Any], input: Any, *args: Any, **named: Any) -> Any:
    out = func(input, *args, **named)
    weight = args[0] if args else named.pop("weight")
    flow.tell_weight(out, (input, weight), func.__name__, *map(str, args[2:]), *map(str, named.items()))
    return out


def _addmm(session: Session, func: Callable[..., Any], input: Any, *args: Any, **named: Any) -> Any:
    out = func(input, *args, **named)
    flow.tell_weight(out, args[:2], "addmm", *map(str, named.items()))
    return out


def _vector(session: Session, func: Callable[..., Any], input: Any, *args: Any, **named: Any) -> Any:
    out = func(input, *args, **named)
    flow.tell_weight(out, (input, args[0] if args else named["vec"]), "mv")
    return out


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.mv, torch.Tensor.mv), _vector),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
}
