"""Activations: what they were computed from is remembered for the product that they may become a branch of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept.flow import origin
from gim.intercept.frames import running
from gim.intercept.session import Session
from gim_kernels.gated import Activation


@dataclass
class Activated:
    """An activation's output, held weakly, and the gate it was computed from."""

    output: Any
    gate: torch.Tensor
    activation: Activation


def activated(session: Session, tensor: torch.Tensor) -> Activated | None:
    """What is remembered of a tensor that is an activation's own output."""
    found = session.activated.get(id(tensor))
    return found if found is not None and found.output() is tensor else None


def _remember(session: Session, output: torch.Tensor, gate: torch.Tensor, activation: Activation) -> None:
    number, known = id(output), session.activated
    held = weakref.ref(output, lambda _: known.pop(number, None))
    known[number] = Activated(held, gate, activation)


def _not_in_place(func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], gate: torch.Tensor) -> Any:
    """Call an activation on a copy where it would overwrite the gate that the backward needs."""
    inplace = named.pop("inplace", args[0] if args and isinstance(args[0], bool) else False)
    if not inplace:
        return func(gate, *args, **named)
    if not (torch.is_grad_enabled() and gate.requires_grad):
        return func(gate, inplace=True, **named)
    return func(gate, **named)


def _silu(session: Session, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any) -> Any:
    out = _not_in_place(func, args, named, input)
    if out.requires_grad:
        _source(session, input)
        _remember(session, out, input, "silu")
    return out


def _gelu(session: Session, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any) -> Any:
    out = func(input, *args, **named)
    if out.requires_grad:
        _source(session, input)
        approximate = named.get("approximate", args[0] if args else "none")
        _remember(session, out, input, "gelu_tanh" if approximate == "tanh" else "gelu")
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
            frame.sources.setdefault((found.place, found.bend), gate)


def source_of(place: Any) -> torch.Tensor | None:
    """What an activation at this place was computed from, as far as it is remembered; the latest clipping counts."""
    for frame in reversed(running.frames[-2:]):
        for bend in (1, 0):
            found = (frame.sources or {}).get((place, bend))
            if found is not None:
                return found
    return None


_BENDING = [
    "relu",
    "relu6",
    "elu",
    "celu",
    "selu",
    "leaky_relu",
    "mish",
    "hardswish",
    "hardsigmoid",
    "softplus",
    "softsign",
    "tanh",
    "sigmoid",
    "logsigmoid",
    "hardtanh",
    "tanhshrink",
    "prelu",
]
_ELEMENTARY = [
    "relu",
    "sigmoid",
    "tanh",
    "pow",
    "square",
    "exp",
    "expm1",
    "erf",
    "abs",
    "reciprocal",
    "sqrt",
    "rsqrt",
    "sin",
    "cos",
    "atan",
]

HANDLERS: dict[Any, Callable[..., Any]] = {
    **{getattr(F, name): _bends for name in _BENDING},
    **{getattr(torch, name): _bends for name in _ELEMENTARY},
    **{getattr(torch.Tensor, name): _bends for name in _ELEMENTARY},
    torch.Tensor.__pow__: _bends,
    F.silu: _silu,
    F.gelu: _gelu,
}
