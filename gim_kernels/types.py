"""What every engine is called with, and what it must be: the contract of all of them, written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Engine = Literal["auto", "triton", "composed", "blockwise", "reference"]
ENGINES: tuple[Engine, ...] = ("auto", "triton", "composed", "blockwise", "reference")

#: Floating-point types of every operator.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Gradient = torch.Tensor | None


@dataclass(frozen=True)
class Options:
    """What shapes attention's forward, the same for every engine.

    Args:
        scale: factor on ``query @ key.T``.
        causal: bottom-right aligned causal mask.
        window: a query at key position ``p`` sees keys ``j > p - window`` only; None for all.
        softcap: ``c`` of ``c * tanh(score / c)``; None for none.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None


class AttentionEngine(Protocol):
    """Attention: Triton, composed, blockwise and the reference. Arguments have been checked by the operator.

    An engine raises by name (``NotImplementedError``, or ``TypeError`` and ``RuntimeError`` for a dtype and a device)
    what it cannot do, and never does something else instead.
    """

    def attention_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        key_range: torch.Tensor | None,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``softmax(scale * Q K^T) V`` and the log-sum-exp of every row; bit for bit the same under every rule.

        Args:
            query: ``[B, HQ, T, D]``; any strides.
            key, value: ``[B, HK, S, D]``.
            sinks: ``[HQ]`` or None.
            key_range: ``[B, 2]`` int32 or None.
            options: scale and mask.

        Returns:
            The output ``[B, HQ, T, D]`` in query's dtype, a view of memory laid out ``[B, T, HQ, D]``, 0 in rows that
            see no key; and the natural log-sum-exp ``[B, HQ, T]`` in float32 (float64 for float64), +inf in rows that
            see no key, so that every ``exp(score - lse)`` there is 0. Only the backward of the same engine reads the
            second: an engine that has no use for it gives zeros.
        """

    def attention_backward(
        self,
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
        """Gradients of the forward under one of the three softmax rules of :func:`gim_kernels.attention`.

        Args:
            grad_out: ``[B, HQ, T, D]``.
            query, key, value, sinks, key_range, options: as in the forward.
            out, lse: what the forward returned.
            softmax_backward: ``"temperature"``, ``"constant"`` or ``"exact"``.
            temperature: T of ``"temperature"``, > 0.
            grad_scale: factors of the gradients of query, key and value.
            needs: which of the gradients of query, key, value and sinks to compute.

        Returns:
            Those gradients, each in its input's shape and dtype, None where not needed. With ``"constant"`` those of
            query, key and sinks are 0 without any work.
        """


class PointwiseEngine(Protocol):
    """Norms and the gated product: Triton, the CPU's and the reference."""

    def rms_norm_forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x / rms(x) * (weight + weight_offset)`` and ``1 / rms`` of each row.

        Args:
            x: ``[..., D]``.
            weight: ``[D]`` or None for 1.
            eps: added to the mean square.
            weight_offset: added to ``weight``; 1 for models that store ``weight - 1``.

        Returns:
            ``[..., D]`` in x's dtype, contiguous, and ``[..., 1]`` in float32 (float64 for float64).
        """

    def layer_norm_forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(x - mean) / std * weight + bias``, and ``mean`` and ``1 / std`` of each row.

        Args:
            x: ``[..., D]``.
            weight: ``[D]`` or None for 1.
            bias: ``[D]`` or None for 0.
            eps: added to the variance.

        Returns:
            ``[..., D]`` in x's dtype, contiguous, and twice ``[..., 1]`` in float32 (float64 for float64).
        """

    def norm_backward(
        self,
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
            The gradient of x in grad_y's dtype, and those of weight and bias in inverse's (the caller rounds them to
            theirs); None where not needed.
        """

    def gated_forward(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """``activation(gate) * up`` for ``[..., D]`` tensors; the activation is rounded to gate's dtype first."""

    def gated_backward(
        self,
        grad_y: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: str,
        *,
        grad_scale: tuple[float, float],
        activation_backward: str,
        needs: tuple[bool, bool],
    ) -> tuple[Gradient, Gradient]:
        """Gradients of the forward, with ``(a, b)`` the factors::

            dgate = a * dy * up * act'(gate)          ratio: act(gate) / gate in place of act'(gate)
            dup   = b * dy * act(gate)

        Args:
            grad_y: ``[..., D]``, in gate's dtype.
            gate, up, activation: as in the forward.
            grad_scale: the factors of gate and up.
            activation_backward: ``"exact"`` or ``"ratio"``.
            needs: which of the gradients of gate and up to compute.

        Returns:
            Those gradients in the shape and dtype of their inputs, None where not needed.
        """
