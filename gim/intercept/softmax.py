"""Attention that a model writes out: a softmax of its own scores, and the product of such weights with the values.

Dropout, which would act between the two, is refused here wherever it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gim.intercept import flow, sources
from gim.intercept.flow import mark, origin
from gim.intercept.session import Session
from gim.intercept.sites import SITES
from gim_kernels.reference import scale_gradient

#: Of a node, that its gradient has its factor.
_SCALED = "gim scaled"


class _Softmax(torch.autograd.Function):
    """Weights, whose backward is ``P_T * (dP - rowsum(P_T * dP))`` with ``P_T = softmax(S / T)``, or nothing."""

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, weights: torch.Tensor, dim: int, temperature: float | None
    ) -> torch.Tensor:
        ctx.temperature, ctx.dim, ctx.dtype = temperature, dim, scores.dtype
        if temperature is not None:
            ctx.save_for_backward(scores)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        if ctx.temperature is None:
            # Zeros, and not none at all: a hook of the user's on the scores is called with a gradient.
            return grads[0].new_zeros(()).expand_as(grads[0]).to(ctx.dtype), None, None, None
        (scores,) = ctx.saved_tensors
        wide = torch.promote_types(scores.dtype, torch.float32)
        # A row that sees no key has no softmax, and passes no gradient on.
        softened = torch.softmax(scores.to(wide) / ctx.temperature, ctx.dim).nan_to_num(0.0)
        grad = grads[0].to(wide)
        grad_s = softened * (grad - (softened * grad).sum(ctx.dim, keepdim=True))
        return grad_s.to(scores.dtype), None, None, None


def _softmax(session: Session, func: Callable[..., Any], scores: torch.Tensor, *args: Any, **named: Any) -> Any:
    """A softmax over keys that the model writes out itself, in the O(T^2) memory of its own scores."""
    if not (scores.requires_grad and torch.is_grad_enabled() and origin(scores).scores):
        return func(scores, *args, **named)
    with SITES.acting("attention"):
        weights = func(scores, *args, **named)
    rules = session.rules
    dim = named.get("dim", args[0] if args else None)
    if not isinstance(dim, int) or "log" in func.__name__:
        session.refuse(f"calls {func.__name__} over its scores in a way that gim does not know how to apply")
        return weights
    if rules.softmax != "constant" and rules.q_scale != rules.k_scale:
        session.refuse("writes its softmax out, where only factors of q and k that are the same can be applied")
        return weights
    _scale_meetings(session, scores, rules.q_scale)
    if rules.softmax != "exact":
        temperature = None if rules.softmax == "constant" else rules.temperature
        # In the numbers of the softmax itself, which may be asked for wider than its scores.
        weights = _Softmax.apply(scores.to(weights.dtype), weights.detach(), dim, temperature)
    found = origin(weights)
    mark(weights, found._replace(weights=(found.number,), scores=False))
    session.expect_values(found.number, weights)
    session.fire("attention", "softmax of its own scores")
    session.note(
        "writes its attention out: scores of T x S entries exist, as in the model's own code, and memory is O(T^2)"
    )
    return weights


def _softmin(session: Session, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any) -> Any:
    """``softmax(-scores)``, as torch has it."""
    if args:  # F.softmin has three places of which the second says nothing
        named = {**dict(zip(("dim", "_stacklevel", "dtype"), args, strict=False)), **named}
    return _softmax(session, F.softmax, -input, **named)


def _scale_meetings(session: Session, scores: torch.Tensor, factor: float) -> None:
    """Give the gradients of queries and keys their factor where they meet: scores may be functions of more."""
    if factor == 1.0:
        return
    for node in sources.meetings(scores):
        if sources.adds(node):
            session.refuse("adds a bias that depends on its input and a product of matrices in one call: add it after")
        if not node.metadata.get(_SCALED):  # scores of one attention may go into those of the next
            node.metadata[_SCALED] = True
            node.register_prehook(lambda grads: tuple(None if one is None else one * factor for one in grads))


def values(session: Session, run: Callable[..., Any], first: torch.Tensor, second: torch.Tensor) -> Any:
    """A product; of attention weights with values, in either order, with the factor of the values' gradient."""
    if not torch.is_grad_enabled():
        return run(first, second)
    one, two = origin(first).weights, origin(second).weights
    if bool(one) == bool(two):
        return run(first, second)
    session.met(one or two)
    scale = session.rules.v_scale
    return session.heads(
        run(scale_gradient(first, scale), second) if two else run(first, scale_gradient(second, scale))
    )


def _matmul(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    if len(args) != 2 or not any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return func(*args, **named)
    out = values(session, lambda a, b: func(a, b, **named), *args)
    flow.tell_weight(out, args, -2)
    return out


def _dropout(session: Session, func: Callable[..., Any], input: Any, p: float = 0.5, *args: Any, **named: Any) -> Any:
    """Dropout that acts makes attributions random."""
    training = named.get("training", args[0] if args else True)
    if p > 0 and training:
        session.refuse(
            f"drops out numbers (p={p:g}) by a call of {func.__name__}: call model.eval(), attributions are "
            "deterministic"
        )
    return func(input, p, *args, **named)


_MATRIX_PRODUCTS = (
    *(torch.matmul, torch.bmm, torch.mm, torch.linalg.matmul),
    *(torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.mm, torch.Tensor.__matmul__),
)
HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax), _softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax, torch.special.log_softmax), _softmax),
    F.softmin: _softmin,
    **dict.fromkeys(_MATRIX_PRODUCTS, _matmul),
    **dict.fromkeys(
        (F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout),
        _dropout,
    ),
}
