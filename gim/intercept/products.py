"""Products and quotients, where gates, norms and the values of a written-out attention meet.

What two factors were computed from says what their product is: a gated product has two branches from one source, one
of them bent; a norm is a value over a statistic of itself. The model's own operation runs; only what it sends back
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gim_kernels
from gim.intercept import activations
from gim.intercept.flow import Origin, mark, origin, same_root, tell_weight
from gim.intercept.frames import running
from gim.intercept.session import Session
from gim.intercept.sites import SITES
from gim.intercept.softmax import values
from gim.intercept.sources import is_statistic, share_a_source
from gim_kernels import told
from gim_kernels.reference import scale_gradient
from gim_kernels.types import DTYPES

#: Computes a product or quotient from its two factors.
Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _named(names: str) -> frozenset[Callable[..., Any]]:
    """The functions of torch, and of its tensors, of these names."""
    return frozenset(getattr(at, one) for at in (torch, torch.Tensor) for one in names.split() if hasattr(at, one))


PRODUCTS = _named("mul multiply __mul__ __rmul__")
QUOTIENTS = _named("div divide true_divide __truediv__")
#: In place, each with the function that does the same into new memory.
IN_PLACE = {
    **dict.fromkeys(_named("mul_ multiply_ __imul__"), torch.mul),
    **dict.fromkeys(_named("div_ divide_ true_divide_ __itruediv__"), torch.div),
}


def flows(x: Any) -> bool:
    """Whether something is a tensor into which an input may flow: no weight, no constant."""
    if not isinstance(x, torch.Tensor) or not x.requires_grad:
        return False
    return x.grad_fn is not None or not isinstance(x, nn.Parameter) or not origin(x).constant


def _product(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    if len(args) < 2 or not flows(args[0]) or not flows(args[1]) or not torch.is_grad_enabled():
        return func(*args, **named)
    plain: Any = IN_PLACE.get(func, func)
    # What is overwritten is a factor that the backward may need.
    first = args[0] if plain is func else args[0].clone()
    result = multiply(session, lambda a, b: plain(a, b, *args[2:], **named), first, args[1], plain in QUOTIENTS)
    return result if plain is func else args[0].copy_(result)


def _fused(session: Session, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any) -> Any:
    """``addcmul`` and ``addcdiv``: a value plus a product."""
    if len(args) != 2 or not flows(args[0]) or not flows(args[1]) or not torch.is_grad_enabled():
        return func(input, *args, **named)
    run = torch.div if "div" in func.__name__ else torch.mul
    return _kept(
        func, input, torch.add(input, multiply(session, run, *args, run is torch.div), alpha=named.get("value", 1))
    )


def _lerp(session: Session, func: Callable[..., Any], input: torch.Tensor, end: Any, weight: Any) -> Any:
    """``start + weight * (end - start)``, a product where the weight is computed."""
    if not flows(weight) or not torch.is_grad_enabled():
        return func(input, end, weight)
    return _kept(func, input, torch.add(input, multiply(session, torch.mul, weight, end - input, False)))


def _kept(func: Callable[..., Any], input: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """A result, in the memory of the first operand where the function writes in place."""
    return input.copy_(result) if func.__name__.endswith("_") else result


def _einsum(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    equation, operands = args[0], list(args[1:])
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if len(operands) != 2 or not isinstance(equation, str):
        return func(*args, **named)
    terms, _, result = equation.replace(" ", "").partition("->")
    one, _, two = terms.partition(",")
    if not all(map(flows, operands)):
        out = func(*args, **named)
    elif one == two == result and torch.is_grad_enabled():
        return multiply(session, lambda a, b: func(equation, a, b), operands[0], operands[1], False)
    else:
        out = values(session, lambda a, b: func(equation, a, b), operands[0], operands[1])
    summed = one[-1:] or ","
    if len(two) == 2 == len({*two}) and summed not in result and result == one[:-1] + two.replace(summed, ""):
        tell_weight(out, operands, two.index(summed) - 2)  # a product of matrices
    else:
        tell_weight(out, operands, None, equation)
    return out


def _glu(session: Session, func: Callable[..., Any], input: torch.Tensor, dim: int = -1) -> Any:
    """``F.glu``: the first half times the sigmoid of the second."""
    if not flows(input) or not torch.is_grad_enabled():
        return func(input, dim)
    up, gate = input.chunk(2, dim)
    if session.rules.activation == "ratio":
        session.refuse("calls F.glu, whose activation has no act(x) / x: use rules with the exact derivative")
    gate_scale, up_scale = session.rules.gate_up_scale
    out = _acting(lambda a, b: a * torch.sigmoid(b), up, gate, up_scale, gate_scale)
    _fire(session, "F.glu", "torch")
    return out


def multiply(session: Session, run: Run, first: torch.Tensor, second: torch.Tensor, quotient: bool) -> torch.Tensor:
    """``run(first, second)``, a product or quotient of two values, with the backward of the session's rules.

    Args:
        session: whose rules.
        run: computes it from the two factors; ``run`` of the same numbers gives the same numbers.
        first, second: the factors.
        quotient: whether the second divides.
    """
    one, two = origin(first), origin(second)
    if one.constant or two.constant:
        return run(first, second)
    if _is_statistic(second, two, first, one):
        return _freeze(session, run, first, second)
    if not quotient and _is_statistic(first, one, second, two):
        return _freeze(session, lambda b, a: run(a, b), second, first)
    if bool(one.weights) != bool(two.weights):
        weights = (first if one.weights else second).shape
        if torch.broadcast_shapes(first.shape, second.shape) == weights or same_root([one, two]) is not None:
            return run(first, second)  # a factor of weights, or their sum
        return values(session, run, first, second)
    places = _places(first)
    if first.shape != second.shape or len(places) < 2 or places[-1] == 1 or one.place == two.place:
        return run(first, second)
    if places != _places(second):
        return run(first, second)  # one is broadcast over the other, though it was given the other's shape before
    return _gate(session, run, first, second, one, two, quotient)


def _is_statistic(small: torch.Tensor, of: Origin, value: torch.Tensor, whole: Origin) -> bool:
    """Whether ``small`` is a statistic of ``value`` over its features, broadcast, maybe times a weight."""
    reduced = of.reduced
    if whole.reduced is not None:
        return False
    if reduced is None:
        return spans(small) < value.numel() and is_statistic(small, whole.root)
    if reduced.root != whole.root or reduced.value == whole.number:
        return False
    return reduced.nonlinear and min(reduced.size, spans(small)) < value.numel()


def _places(tensor: torch.Tensor) -> list[int]:
    """How many different places each axis of a tensor has: one that only repeats has one."""
    return [size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def spans(tensor: torch.Tensor) -> int:
    """How many different places a tensor has."""
    return prod(_places(tensor))


def _freeze(session: Session, run: Run, value: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
    whole = origin(value)
    if whole.scores and whole.bend == 2:
        session.refuse(
            "divides its scores by a statistic of them, which may be a softmax that it writes out: call softmax"
        )
        return run(value, statistic)
    with SITES.acting("norm"):
        out = run(value, statistic.detach() if session.rules.freeze_norm else statistic)
    session.fire("norm", "a value over a statistic of it")
    return out


def _acting(run: Run, first: torch.Tensor, second: torch.Tensor, *by: float) -> torch.Tensor:
    """``run(first, second)``, a gated product, with the factors of both gradients."""
    with SITES.acting("gated_mlp"):
        return run(scale_gradient(first, by[0]), scale_gradient(second, by[1]))


def _gate(
    session: Session, run: Run, first: torch.Tensor, second: torch.Tensor, one: Origin, two: Origin, quotient: bool
) -> torch.Tensor:
    """A product of two branches, where it is gated; else what ``run`` gives."""
    for whole, part in ((one, two), (two, one)):
        branch = next((name for *place, name in whole.factors if tuple(place) == part.place), None)
        if branch is not None:
            return _more_of(branch, session, run, first, second, whole, part, part is one)
    if max(one.bend, two.bend) == 0 or not share_a_source(first, second):
        return run(first, second)
    gate_scale, up_scale = session.rules.gate_up_scale
    if one.bend == two.bend and gate_scale != up_scale:
        session.refuse("multiplies two branches that are both bent, of which neither can be told to be the gate")
        return run(first, second)
    gate_first = one.bend >= two.bend
    roles = tuple(
        (root, path, name)
        for whole, name in ((one, "gate" if gate_first else "up"), (two, "up" if gate_first else "gate"))
        for root, path, _ in whole.factors or ((*whole.place, ""),)
    )
    gate, up = (first, second) if gate_first else (second, first)
    known = None if quotient else activations.activated(session, gate)
    if known is not None and up.dtype == known.gate.dtype and known.gate.dtype in DTYPES:
        with told.listening() as ran:
            out = gim_kernels.gated(
                known.gate,
                up,
                known.activation,
                grad_scale=session.rules.gate_up_scale,
                activation_backward=session.rules.activation,
                engine=session.engine,
            )
        return _done(session, out, roles, f"{known.activation}(gate) * up", str(ran))
    if session.rules.activation == "ratio":
        gate = _ratio(session, gate, one if gate_first else two, quotient and not gate_first)
    out = _acting(run, gate, up, gate_scale, up_scale) if gate_first else _acting(run, up, gate, up_scale, gate_scale)
    return _done(session, out, roles, "a product of two branches, one of them bent")


def _more_of(
    branch: str,
    session: Session,
    run: Run,
    first: torch.Tensor,
    second: torch.Tensor,
    whole: Origin,
    part: Origin,
    is_first: bool,
) -> torch.Tensor:
    """A product with more of a branch that is in it already: its own factor, and none for the rest again."""
    gate, up = session.rules.gate_up_scale
    if branch:
        if branch == "gate" and session.rules.activation == "ratio":
            session.refuse(
                "multiplies its branches by more of the gate afterwards, where act(x) / x of all of it cannot be "
                "applied: use rules with the exact derivative"
            )
        by = gate if branch == "gate" else up
        out = _acting(run, first, second, *((by, 1.0) if is_first else (1.0, by)))
        mark(out, origin(out)._replace(factors=whole.factors))
        return out
    if part.bend == 0:
        return run(first, second)
    if gate != up or session.rules.activation == "ratio":
        session.refuse(
            "multiplies its branches before one of them is bent, where factors that differ, or act(x) / x, cannot be "
            "applied"
        )
        return run(first, second)
    roles = tuple((r, p, "gate" if (r, p) == part.place else "up") for r, p, _ in whole.factors)
    return _done(session, _acting(run, first, second, gate, up), roles, "a product of branches, bent after it")


def _done(
    session: Session, out: torch.Tensor, roles: tuple[tuple[int, Any, str], ...], how: str, engine: str = "torch"
) -> torch.Tensor:
    mark(out, origin(out)._replace(factors=roles))
    _fire(session, how, engine)
    return out


def _fire(session: Session, how: str, engine: str) -> None:
    frame = running.frames[-1]
    if not frame.counted:
        session.fire("gated_mlp", how, engine)
    frame.counted = True


def _ratio(session: Session, gate: torch.Tensor, found: Origin, divides: bool) -> torch.Tensor:
    """The branch of a gate with ``act(x) / x`` in place of its derivative, and the derivative where x is 0.

    Where the branch divides, ``act`` is one over it, whose slope ``act(x) / x`` is minus ``branch / x`` of the branch.
    """
    source = activations.source_of(found.place)
    if source is None or source.shape != gate.shape:
        session.refuse(
            "bends its gate in a way whose argument gim did not see, so act(x) / x cannot take the place of its "
            "derivative: use rules with the exact derivative"
        )
        return gate
    with torch.no_grad():
        zero = source == 0
        ratio = (-gate if divides else gate) / torch.where(zero, 1, source)
    if bool(zero.any()):
        (slope,) = torch.autograd.grad(gate, source, torch.ones_like(gate), retain_graph=True)
        ratio = torch.where(zero, slope, ratio)
    # source - source is 0 with gradient 1: the value is the activation's own, bit for bit.
    return gate.detach() + ratio.detach() * (source - source.detach())


HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(PRODUCTS | QUOTIENTS | IN_PLACE.keys(), _product),
    **dict.fromkeys((torch.addcmul, torch.Tensor.addcmul, torch.Tensor.addcmul_), _fused),
    **dict.fromkeys((torch.addcdiv, torch.Tensor.addcdiv, torch.Tensor.addcdiv_), _fused),
    **dict.fromkeys((torch.lerp, torch.Tensor.lerp, torch.Tensor.lerp_), _lerp),
    torch.einsum: _einsum,
    F.glu: _glu,
}
