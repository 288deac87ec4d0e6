"""The specification as an engine: forward and backward of each operator, derived from it by torch's own autograd.

It keeps for the backward what every engine keeps, and runs the specification again there: a whole model under it holds
the T x S scores of one layer at a time.
"""

from __future__ import annotations

import torch

from gim_kernels import reference
from gim_kernels.inner_autograd import gradients, leaf, recording
from gim_kernels.told import tell
from gim_kernels.types import Gradient, Options

NAME = "reference"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gim_kernels.reference.attention`, in O(T S) memory; no use for the log-sum-exp."""
    tell(NAME)
    out = reference.attention(query, key, value, sinks=sinks, key_range=key_range, **vars(options))
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, query.new_zeros(query.shape[:3], dtype=_wide(query.dtype))


def attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    *,
    softmax_backward: str,
    temperature: float,
    grad_scale: tuple[float, float, float],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    """Its gradients, by autograd."""
    q, k, v = (leaf(x, need) for x, need in zip((query, key, value), needs, strict=False))
    s = None if sinks is None else leaf(sinks, needs[3])
    with recording():
        again = reference.attention(
            q,
            k,
            v,
            sinks=s,
            key_range=key_range,
            softmax_backward=softmax_backward,
            temperature=temperature,
            grad_scale=grad_scale,
            **vars(options),
        )
    grad_query, grad_key, grad_value, grad_sinks = gradients(again, grad_out, (q, k, v, s))
    return grad_query, grad_key, grad_value, grad_sinks


def forward_workspace(query: torch.Tensor, key: torch.Tensor) -> int:
    """Bytes that the forward holds besides its arguments and results: three matrices of all scores, and who sees whom
    (measured)."""
    return query.shape[2] * key.shape[2] * (3 * query.shape[0] * query.shape[1] * _wide(query.dtype).itemsize + 2)


def backward_workspace(query: torch.Tensor, key: torch.Tensor) -> int:
    """The same of the backward: five such matrices, which a temperature takes; the other rules take three or four."""
    return query.shape[2] * key.shape[2] * (5 * query.shape[0] * query.shape[1] * _wide(query.dtype).itemsize + 2)


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gim_kernels.reference.rms_norm`."""
    tell(NAME)
    y = reference.rms_norm(x, weight, eps, weight_offset=weight_offset)
    inverse = torch.rsqrt(x.to(_wide(x.dtype)).pow(2).mean(-1, keepdim=True) + eps)
    return y.contiguous(), inverse.contiguous()


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gim_kernels.reference.layer_norm`."""
    tell(NAME)
    y = reference.layer_norm(x, weight, bias, eps)
    wide = x.to(_wide(x.dtype))
    mean = wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt((wide - mean).pow(2).mean(-1, keepdim=True) + eps)
    return y.contiguous(), mean.contiguous(), inverse.contiguous()


def norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    weight_offset: float,
    *,
    frozen: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Gradient, Gradient, Gradient]:
    """Its gradients, by autograd, from the same equation with the statistic that the forward gave."""
    need_x, need_weight, need_bias = needs
    wide = inverse.dtype
    # Without x the statistic is a constant, and y linear in x: its gradient is the same at every x.
    given = torch.zeros_like(grad_y) if x is None else x
    given = leaf(given, need_x)
    factor = None if weight is None else leaf(weight.to(wide), need_weight)
    shift = leaf(inverse.new_zeros(grad_y.shape[-1]), need_bias)
    with recording():
        centred = given.to(wide)
        if mean is not None:
            centred = centred - centred.mean(-1, keepdim=True)
        statistic = inverse
        if not frozen:
            square = centred.pow(2).mean(-1, keepdim=True)
            # What the forward's statistic holds beyond the mean square is eps.
            statistic = torch.rsqrt(square + (inverse.pow(-2) - square.detach()))
        y = centred * statistic
        if factor is not None:
            y = y * (factor + weight_offset)
        y = (y + shift).to(grad_y.dtype)
    grad_x, grad_weight, grad_bias = gradients(y, grad_y, (given, factor, shift))
    return grad_x, grad_weight, grad_bias


def gated_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """:func:`gim_kernels.reference.gated`."""
    tell(NAME)
    return reference.gated(gate, up, activation)


def gated_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    grad_scale: tuple[float, float],
    activation_backward: str,
    needs: tuple[bool, bool],
) -> tuple[Gradient, Gradient]:
    """Its gradients, by autograd."""
    branch, other = leaf(gate, needs[0]), leaf(up, needs[1])
    with recording():
        y = reference.gated(branch, other, activation, grad_scale=grad_scale, activation_backward=activation_backward)
    grad_gate, grad_up = gradients(y, grad_y, (branch, other))
    return grad_gate, grad_up
