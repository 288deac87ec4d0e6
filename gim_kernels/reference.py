"""The specification: every public function in eager PyTorch, with the same name and signature.

Nothing here is fast or frugal: the attention keeps whole score matrices. Every engine is held against these
functions, which run on any device and in any floating-point type, float64 above all. The rules are written with
detached tensors, so that torch's own autograd derives every gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x`` itself in the forward; in the backward its gradient times ``factor``."""
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    key_range: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Which key each query sees.

    Args:
        queries, keys: T and S. Query ``i`` stands at key position ``i + S - T``.
        causal: a query sees no key after its own position.
        window: with ``w``, a query at position ``p`` sees keys ``j > p - w`` only.
        key_range: ``[B, 2]``, the first and one past the last key that exist in each row.
        device: where to build it.

    Returns:
        Booleans ``[B or 1, 1, T, S]``.
    """
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)  # [T, 1]
    key = torch.arange(keys, device=device)[None, :]  # [1, S]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        mask = mask & (key <= position)
    if window is not None:
        mask = mask & (key > position - window)
    mask = mask[None, None]  # [1, 1, T, S]
    if key_range is not None:
        first, end = key_range.to(device).unbind(-1)
        exists = (key >= first[:, None]) & (key < end[:, None])  # [B, S]
        mask = mask & exists[:, None, None, :]
    return mask


def attention_weights(scores: torch.Tensor, softmax_backward: str, temperature: float) -> torch.Tensor:
    """The softmax over the last axis of scores ``[.., S]``, with a choice of its backward; 0 where all are -inf.

    ``P_1 + temperature * (P_T - P_T.detach())`` with ``P_T = softmax(S / temperature)`` has the value of ``P_1``
    and, since the Jacobian of ``P_T`` carries the factor ``1 / temperature``, exactly the gradient
    ``P_T * (dP - rowsum(P_T * dP))``.
    """
    # A row that sees nothing must give 0, not 0 / 0: it is made finite here and erased below.
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1)
    if softmax_backward == "constant":
        weights = weights.detach()
    elif softmax_backward == "temperature":
        softened = torch.softmax(scores / temperature, dim=-1)
        weights = weights.detach() + temperature * (softened - softened.detach())
    return weights.masked_fill(empty, 0.0)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
) -> torch.Tensor:
    """What the softmax is of, ``[B, HQ, T, S]``, with a column for the sinks where there are any."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.mT) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(query.shape[2], key.shape[2], causal=causal, window=window, key_range=key_range, device=query.device)
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_range: torch.Tensor | None = None,
    softmax_backward: str = "exact",
    temperature: float = 2.0,
    grad_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    engine: str = "reference",
) -> torch.Tensor:
    """Attention with a choice of softmax backward; see :func:`gim_kernels.attention` for the arguments."""
    query, key, value = (scale_gradient(x, factor) for x, factor in zip((query, key, value), grad_scale, strict=True))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Handed on and not held here: two T x S tensors fewer live at once.
    weights = attention_weights(
        _scores(query, key, scale, causal, window, softcap, sinks, key_range), softmax_backward, temperature
    )[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    frozen: bool = False,
    engine: str = "reference",
) -> torch.Tensor:
    """``x / rms(x) * (weight + weight_offset)``; with ``frozen`` the rms is a constant of the backward."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    statistic = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = wide * (statistic.detach() if frozen else statistic)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    frozen: bool = False,
    engine: str = "reference",
) -> torch.Tensor:
    """``(x - mean) / std * weight + bias``; with ``frozen`` the std, not the mean, is a constant of the backward."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    statistic = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    y = centred * (statistic.detach() if frozen else statistic)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype)


def activation_function(x: torch.Tensor, activation: str) -> torch.Tensor:
    """One of the activations that :func:`gated` knows, by name."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_ratio(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(x) / x``, with its limit at 0."""
    if activation == "silu":
        return torch.sigmoid(x)
    if activation == "gelu_tanh":
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    grad_scale: tuple[float, float] = (1.0, 1.0),
    activation_backward: str = "exact",
    engine: str = "reference",
) -> torch.Tensor:
    """``activation(gate) * up`` with a factor on each branch's gradient; ``act(x) / x`` for ``act'(x)`` on request."""
    gate, up = scale_gradient(gate, grad_scale[0]), scale_gradient(up, grad_scale[1])
    if activation_backward == "ratio":
        # gate - gate.detach() is 0 with gradient 1: the value is the activation's own, bit for bit.
        ratio = activation_ratio(gate.detach(), activation)
        activated = activation_function(gate.detach(), activation) + ratio * (gate - gate.detach())
    else:
        activated = activation_function(gate, activation)
    return activated * up
