"""The product at the heart of a gated MLP, with a factor on each branch's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from gim_kernels import engines, operators
from gim_kernels.arguments import are_finite, check_tensor, choice
from gim_kernels.types import Engine, Gradient

Activation = Literal["silu", "gelu", "gelu_tanh"]
ActivationBackward = Literal["exact", "ratio"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")
ACTIVATION_BACKWARDS: tuple[ActivationBackward, ...] = ("exact", "ratio")


def _run_gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Activation,
    grad_scale: Sequence[float],
    activation_backward: ActivationBackward,
    engine: Engine,
) -> torch.Tensor:
    return engines.pointwise_of(engine).gated_forward(gate, up, activation)


def _fake_gated(gate: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(gate)


def _run_gated_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Activation,
    grad_scale: Sequence[float],
    activation_backward: ActivationBackward,
    engine: Engine,
    needs: Sequence[bool],
) -> tuple[Gradient, Gradient]:
    return engines.pointwise_of(engine).gated_backward(
        grad_y,
        gate,
        up,
        activation,
        grad_scale=(grad_scale[0], grad_scale[1]),
        activation_backward=activation_backward,
        needs=(needs[0], needs[1]),
    )


def _fake_gated_backward(
    grad_y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    inputs = zip((gate, up), rest[-1], strict=True)
    return tuple(torch.empty_like(x) if need else grad_y.new_empty(0) for x, need in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, *settings = inputs
    ctx.settings = tuple(settings)
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:2]]
    grads = _gated_backward(grad_y, gate, up, *ctx.settings, needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_gated = operators.define(
    "gated(Tensor gate, Tensor up, str activation, float[] grad_scale, str activation_backward, str engine) -> Tensor",
    _run_gated,
    _fake_gated,
    _save,
    _differentiate,
)


def _backward_of_several(grads: torch.Tensor, *others: Any) -> tuple[Gradient, ...] | None:
    """The backward for gradients with one dimension more in front."""
    *_, engine, _ = others
    return _run_gated_backward(grads, *others) if engines.takes_several(engine) else None


_gated_backward = operators.define(
    "gated_backward(Tensor grad_y, Tensor gate, Tensor up, str activation, float[] grad_scale, "
    "str activation_backward, str engine, bool[] needs) -> (Tensor, Tensor)",
    _run_gated_backward,
    _fake_gated_backward,
    several=_backward_of_several,
)


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Activation,
    *,
    grad_scale: Sequence[float] = (1.0, 1.0),
    activation_backward: ActivationBackward = "exact",
    engine: Engine = "auto",
) -> torch.Tensor:
    """``activation(gate) * up`` with a factor on the gradient of each branch.

    Backward, with ``(a, b)`` the factors and ``act`` the activation::

        dgate = a * dy * up * act'(gate)          ratio: act(gate) / gate in place of act'(gate)
        dup   = b * dy * act(gate)

    Args:
        gate: ``[..., D]``, float32, float64, bfloat16 or float16.
        up: as ``gate``.
        activation: ``"silu"``, ``"gelu"`` (with erf) or ``"gelu_tanh"``.
        grad_scale: the factors of gate and up.
        activation_backward: ``"exact"`` or ``"ratio"``.
        engine: as in :func:`gim_kernels.rms_norm`.

    Returns:
        ``[..., D]`` in gate's dtype.

    Raises:
        TypeError: a dtype that is not floating point or differs between the two.
        ValueError: shapes or devices that differ, an unknown name, a factor that is not finite.
        RuntimeError: as :func:`gim_kernels.engines.check_transforms`.

    Numerics: activation and product are each rounded to the inputs' dtype, as in eager PyTorch; deterministic.

    Source: Shazeer 2020, arXiv 2002.05202; the factors: Edin et al. 2025, arXiv 2505.17630; the ratio: Achtibat et
    al. 2024, arXiv 2402.05602.
    """
    check_tensor("gate", gate)
    check_tensor("up", up)
    if up.shape != gate.shape:
        raise ValueError(f"up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}")
    if up.dtype != gate.dtype:
        raise TypeError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    if up.device != gate.device:
        raise ValueError(f"up must be on gate's device {gate.device}, got {up.device}")
    choice("activation", activation, ACTIVATIONS)
    choice("activation_backward", activation_backward, ACTIVATION_BACKWARDS)
    if not are_finite(grad_scale, 2):
        raise ValueError(f"grad_scale must be two finite factors for gate and up, got {grad_scale!r}")
    factors = [float(factor) for factor in grad_scale]
    engines.check_transforms("gated", gate, up)
    return _gated(gate, up, activation, factors, activation_backward, engines.choose_pointwise(engine, gate))
