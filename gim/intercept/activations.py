"""Activations: what they were computed from is remembered for the product that they may become a branch of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept.flow import mark, origin
from gim.intercept.frames import running
from gim.intercept.session import Session
from gim_kernels.gated import Activation


@dataclass
class Activated:
    """An activation's output, held weakly, and the gate it was computed from.

    Args:
        versions: of both, as they were: what has been written into since is not what is remembered.
    """

    output: Any
    gate: torch.Tensor
    activation: Activation
    versions: tuple[int, int]


def activated(session: Session, tensor: torch.Tensor) -> Activated | None:
    """What is remembered of a tensor that is an activation's own output, and whose own gradient nobody asks for."""
    found = session.activated.get(id(tensor))
    if found is None or found.output() is not tensor or found.versions != (tensor._version, found.gate._version):
        return None
    return None if tensor._backward_hooks or tensor.retains_grad else found


def _remember(session: Session, output: torch.Tensor, gate: torch.Tensor, activation: Activation) -> None:
    number, known = id(output), session.activated
    held = weakref.ref(output, lambda _: known.pop(number, None))
    known[number] = Activated(held, gate, activation, (output._version, gate._version))


def _known(session: Session, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any) -> Any:
    """An activation that the kernels have, ``silu`` or ``gelu``."""
    out = func(input, *args, **named)
    if out.requires_grad and out is not input:  # which it is in place, where no gradients are recorded
        _source(session, input)
        tanh = named.get("approximate", args[0] if args else "none") == "tanh"
        _remember(session, out, input, "silu" if func is F.silu else "gelu_tanh" if tanh else "gelu")
    return out


def _bends(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Any other function number by number; only ``act(x) / x`` asks for what it was computed from."""
    if session.rules.activation == "ratio":
        for one in args:
            if isinstance(one, torch.Tensor):
                _source(session, one)
    return func(*args, **named)


def _source(session: Session, gate: torch.Tensor) -> None:
    if session.rules.activation != "ratio" or not gate.requires_grad or not torch.is_grad_enabled():
        return
    found = origin(gate)
    if found.bend < 2:
        for frame in running.frames[-2:]:
            frame.sources = frame.sources or {}
            frame.sources.setdefault((found.place, found.bend), (gate, gate._version))


def source_of(place: Any) -> torch.Tensor | None:
    """What an activation at this place was computed from, as far as it is remembered; the latest clipping counts."""
    for frame in reversed(running.frames[-2:]):
        for bend in (1, 0):
            found = (frame.sources or {}).get((place, bend))
            if found is not None:
                gate, version = found
                return gate if gate._version == version else None  # else written over since
    return None


def _in_place(session: Session, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any) -> Any:
    """A function that may write its result over its argument, which the backward of a gate needs."""
    plain, place = _WRITE.get(func), _INPLACE.get(func, len(args))
    writes = plain is not None or named.get("inplace", place < len(args) and args[place])
    act = _known if func is F.silu else _bends
    if not (writes and input.requires_grad and torch.is_grad_enabled()):
        return act(session, func, input, *args, **named)
    named.pop("inplace", None)
    result = act(session, plain or func, input.clone(), *args[:place], **named)
    known = activated(session, result)
    out = input.copy_(result)
    mark(out, origin(result))  # a view's own node would tell of all that it is a view of
    if known is not None:
        _remember(session, out, known.gate, known.activation)
    return out


_BENDING = [
    "relu", "relu6", "elu", "celu", "selu", "leaky_relu", "mish", "hardswish", "hardsigmoid", "softplus", "softsign",
    "tanh", "sigmoid", "logsigmoid", "hardtanh", "tanhshrink", "prelu",
]  # fmt: skip
_ELEMENTARY = [
    "relu", "sigmoid", "tanh", "pow", "square", "exp", "expm1", "erf", "abs", "reciprocal", "sqrt", "rsqrt", "sin",
    "cos", "atan",
]  # fmt: skip

#: Where ``inplace`` stands behind the input, of the functions that have it.
_INPLACE: dict[Any, int] = {
    func: [*signature(func).parameters].index("inplace") - 1
    for func in (F.silu, *(getattr(F, name) for name in _BENDING))
    if isinstance(func, FunctionType) and "inplace" in signature(func).parameters
}
#: Functions that always write, each with the one that does the same into new memory.
_WRITE: dict[Any, Callable[..., Any]] = {
    getattr(place, f"{name}_"): getattr(F, name)
    for place in (torch, torch.Tensor, F)
    for name in _BENDING
    if hasattr(place, f"{name}_")
}

HANDLERS: dict[Any, Callable[..., Any]] = {
    **{getattr(F, name): _bends for name in _BENDING},
    **{getattr(torch, name): _bends for name in _ELEMENTARY},
    **{getattr(torch.Tensor, name): _bends for name in _ELEMENTARY},
    torch.Tensor.__pow__: _bends,
    F.gelu: _known,
    **dict.fromkeys((*_INPLACE, *_WRITE), _in_place),
}
