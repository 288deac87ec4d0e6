"""Norms that are one function of torch; a norm written out is a product (:mod:`gim.intercept.products`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import gim_kernels
from gim.intercept.flow import origin
from gim.intercept.session import Session
from gim.intercept.sites import SITES
from gim_kernels import told


def _layer_norm(
    session: Session,
    func: Callable[..., Any],
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
    **ignored: Any,
) -> torch.Tensor:
    """``unused`` is ``torch.layer_norm``'s ``cudnn_enable``, which changes nothing."""

    def apply(x: torch.Tensor, w: torch.Tensor | None, **options: Any) -> torch.Tensor:
        return gim_kernels.layer_norm(x, w, None if bias is None else bias.flatten(), eps, **options)

    return _norm(session, func, apply, input, normalized_shape, weight, bias, eps)


def _rms_norm(
    session: Session,
    func: Callable[..., Any],
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    number = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps

    def apply(x: torch.Tensor, w: torch.Tensor | None, **options: Any) -> torch.Tensor:
        return gim_kernels.rms_norm(x, w, number, **options)

    return _norm(session, func, apply, input, normalized_shape, weight, eps)


def _norm(
    session: Session,
    func: Callable[..., Any],
    apply: Callable[..., torch.Tensor],
    x: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None,
    *rest: Any,
) -> torch.Tensor:
    """A norm over the last dimensions, taken as one."""
    shape, name = tuple(normalized_shape), f"F.{func.__name__}"
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        return func(x, normalized_shape, weight, *rest)  # torch raises its own error
    options = {"frozen": session.rules.freeze_norm, "engine": session.engine}
    try:
        flat = x.flatten(-len(shape)) if len(shape) > 1 else x
        with told.listening() as ran:
            y = apply(flat, None if weight is None else weight.flatten(), **options).reshape(x.shape)
    except (TypeError, ValueError) as error:
        session.refuse(f"{name}: {error}", error)
        return func(x, normalized_shape, weight, *rest)
    session.fire("norm", f"call of {name}", str(ran))
    return y


def _normalize(
    session: Session,
    func: Callable[..., Any],
    input: torch.Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x / max(|x|, eps)``: a norm whose statistic is a length."""
    if not input.requires_grad or out is not None:
        return func(input, p, dim, eps, out)
    whole = origin(input)
    if whole.scores and whole.bend == 2:
        session.refuse("normalises its scores, which may be a softmax that it writes out: call softmax")
        return func(input, p, dim, eps)
    length = input.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(input)
    session.fire("norm", "call of F.normalize")
    with SITES.acting("norm"):
        return input / (length.detach() if session.rules.freeze_norm else length)


def _other_norm(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """A norm whose statistic the kernels cannot freeze."""
    if session.rules.freeze_norm:
        session.refuse(
            f"calls {func.__name__}, whose statistic cannot be frozen: pass freeze_norm=False, or use a norm over the "
            "last dimension"
        )
    return func(*args, **named)


def _batch_norm(
    session: Session,
    func: Callable[..., Any],
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Outside training the statistics of a batch norm are constants already."""
    if training:
        return _other_norm(session, func, input, running_mean, running_var, weight, bias, training, momentum, eps)
    session.fire("norm", "call of F.batch_norm", rule="statistic constant")
    return func(input, running_mean, running_var, weight, bias, training, momentum, eps)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.normalize: _normalize,
    F.batch_norm: _batch_norm,
    **dict.fromkeys(
        (F.group_norm, torch.group_norm, F.instance_norm, F.local_response_norm, torch.native_layer_norm), _other_norm
    ),
}
