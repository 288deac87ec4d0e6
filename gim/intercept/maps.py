"""Linear maps, whose weights tell one from another: one map of one value is one value, however often it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept import flow
from gim.intercept.session import Session


def _map(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """A value times a weight, and how; what is added to the product does not tell it from others."""
    out = func(*args, **named)
    first = 1 if func in _ADDING else 0
    operands, how = args[first : first + 2], args[3:]
    if named:
        operands += tuple([named[name] for name in ("weight", "vec") if name in named])
        how += tuple([item for item in named.items() if item[0] not in ("weight", "vec", "bias")])
    flow.tell_weight(out, operands[:2], _AXES.get(func), func.__name__, *map(str, how))
    return out


#: Maps whose first argument is what is added to the product.
_ADDING = (torch.addmm, torch.Tensor.addmm)
#: Over which of its last two axes a weight that comes second is summed.
_AXES = {F.linear: -1, **dict.fromkeys(_ADDING, -2), **dict.fromkeys((torch.mv, torch.Tensor.mv), -2)}
HANDLERS: dict[Any, Callable[..., Any]] = dict.fromkeys(
    (
        F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.mv, torch.Tensor.mv,
        *_ADDING,
    ),
    _map,
)  # fmt: skip
