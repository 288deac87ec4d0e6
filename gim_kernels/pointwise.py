"""Norms and the gated product in plain PyTorch: forward and backward of what Triton fuses on a GPU.

Every function takes and returns plain tensors and knows nothing of autograd; ``gim_kernels.triton`` has functions of
the same names and signatures.
"""

from __future__ import annotations

import torch

from gim_kernels.reference import activation_function, activation_ratio


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``[N, D]``, to sum over everything but its last dimension."""
    return x.reshape(-1, x.shape[-1])


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / rms(x) * (weight + weight_offset)`` and ``1 / rms`` of each row.

    Args:
        x: ``[..., D]``.
        weight: ``[D]`` or None for 1.
        eps: added to the mean square.
        weight_offset: added to ``weight``; 1 for models that store ``weight - 1``.

    Returns:
        ``[..., D]`` in x's dtype, and ``[..., 1]`` in float32 (float64 for float64).
    """
    wide = _wide(x)
    inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = wide * inverse_rms
    if weight is not None:
        y.mul_(_wide(weight) + weight_offset if weight_offset else _wide(weight))
    return y.to(x.dtype), inverse_rms


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(x - mean) / std * weight + bias``, and ``mean`` and ``1 / std`` of each row.

    Args:
        x: ``[..., D]``.
        weight: ``[D]`` or None for 1.
        bias: ``[D]`` or None for 0.
        eps: added to the variance.

    Returns:
        ``[..., D]`` in x's dtype, and twice ``[..., 1]`` in float32 (float64 for float64).
    """
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    y = wide - mean
    inverse_std = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    y.mul_(inverse_std)
    if weight is not None:
        y.mul_(_wide(weight))
    if bias is not None:
        y.add_(_wide(bias))
    return y.to(x.dtype), mean, inverse_std


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
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of both norms, with ``n = (x - mean) * inverse`` and ``g = grad_y * (weight + weight_offset)``::

        live     dx = inverse * (g - rowmean(g)  - n * rowmean(g * n))
        frozen   dx = inverse * (g - rowmean(g))
        dweight = sum(grad_y * n),  dbias = sum(grad_y)

    without the term ``rowmean(g)`` for the RMS norm, which has no mean.

    Args:
        grad_y: ``[..., D]``.
        x: the input; None where ``frozen`` and the weight needs no gradient.
        weight: ``[D]`` or None.
        mean: ``[..., 1]`` of a layer norm, None for an RMS norm. Only its presence matters where x is None.
        inverse: ``[..., 1]``, one over the statistic.
        weight_offset: as in the forward.
        frozen: whether the statistic is a constant.
        needs: which of the gradients of x, weight and bias to compute.

    Returns:
        Those gradients in their inputs' dtypes (float32 for the weight and the bias of half-precision inputs is
        rounded to theirs by the caller), None where not needed.
    """
    need_x, need_weight, need_bias = needs
    wide = _wide(grad_y)
    normalised = None
    if x is not None and (need_weight or not frozen):
        normalised = (_wide(x) if mean is None else _wide(x) - mean) * inverse
    grad_x = grad_weight = grad_bias = None
    if need_x:
        scaled = wide
        if weight is not None:
            scaled = wide * (_wide(weight) + weight_offset if weight_offset else _wide(weight))
        total = scaled if mean is None else scaled - scaled.mean(-1, keepdim=True)
        if not frozen and normalised is not None:
            total = total - normalised * (scaled * normalised).mean(-1, keepdim=True)
        grad_x = (total * inverse).to(grad_y.dtype)
    if need_weight and normalised is not None:
        grad_weight = _rows(wide * normalised).sum(0)
    if need_bias:
        grad_bias = _rows(wide).sum(0)
    return grad_x, grad_weight, grad_bias


def gated_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` for ``[..., D]`` tensors."""
    return activation_function(gate, activation) * up


def gated_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    grad_scale: tuple[float, float],
    activation_backward: str,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`gated_forward`; ``act(gate) / gate`` takes the place of ``act'(gate)`` under ``"ratio"``."""
    grad_gate = grad_up = None
    if needs[0]:
        through_product = grad_y * up
        if activation_backward == "ratio":
            grad_gate = through_product.mul_(activation_ratio(gate, activation))
        elif activation == "silu":
            grad_gate = torch.ops.aten.silu_backward(through_product, gate)
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            grad_gate = torch.ops.aten.gelu_backward(through_product, gate, approximate=approximate)
        if grad_scale[0] != 1.0:
            grad_gate = grad_gate * grad_scale[0]
    if needs[1]:
        grad_up = grad_y * activation_function(gate, activation)
        if grad_scale[1] != 1.0:
            grad_up.mul_(grad_scale[1])
    return grad_gate, grad_up
