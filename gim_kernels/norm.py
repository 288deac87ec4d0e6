"""RMS norm and layer norm whose statistic may be a constant of the backward."""

from __future__ import annotations

import math
from typing import Any

import torch

from gim_kernels import engines, operators
from gim_kernels.arguments import check_tensor, is_between
from gim_kernels.types import Engine, Gradient


def _run_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    frozen: bool,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor]:
    return engines.pointwise_of(engine).rms_norm_forward(x, weight, eps, weight_offset)


def _statistic_like(x: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(*x.shape[:-1], 1, dtype=wide)


def _fake_rms_norm(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _statistic_like(x)


def _run_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    frozen: bool,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return engines.pointwise_of(engine).layer_norm_forward(x, weight, bias, eps)


def _fake_layer_norm(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, _statistic_like(x), _statistic_like(x)


def _run_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    weight_offset: float,
    frozen: bool,
    engine: Engine,
    needs: list[bool],
) -> tuple[Gradient, Gradient, Gradient]:
    return engines.pointwise_of(engine).norm_backward(
        grad_y, x, weight, mean, inverse, weight_offset, frozen=frozen, needs=(needs[0], needs[1], needs[2])
    )


def _fake_norm_backward(
    grad_y: torch.Tensor, x: Any, weight: Any, mean: Any, inverse: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    needs = rest[-1]
    shapes = (grad_y.shape, grad_y.shape[-1:], grad_y.shape[-1:])
    dtypes = (grad_y.dtype, inverse.dtype, inverse.dtype)
    return tuple(
        grad_y.new_empty(shape, dtype=dtype) if need else grad_y.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _save(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_offset: float,
    frozen: bool,
    engine: Engine,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
) -> None:
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)
    ctx.settings = (weight_offset, frozen, engine)
    ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
    # A frozen statistic leaves nothing in the backward that depends on x, unless the weight asks for its own
    # gradient: then one number for each row is all that is kept.
    keep_input = not frozen or ctx.needs_input_grad[1]
    # Without x the mean's values are unused too, but that there is one decides the formula: an empty one tells.
    if mean is not None and not keep_input:
        mean = mean.new_empty(0)
    ctx.save_for_backward(x if keep_input else None, weight, mean, inverse)


def _differentiate(ctx: Any, grad_y: torch.Tensor, needs: list[bool]) -> tuple[torch.Tensor | None, ...]:
    x, weight, mean, inverse = ctx.saved_tensors
    grads = _norm_backward(grad_y, x, weight, mean, inverse, *ctx.settings, needs)
    dtypes = (grad_y.dtype, *ctx.dtypes)
    return tuple(grad.to(dtype) if need else None for grad, dtype, need in zip(grads, dtypes, needs, strict=True))


def _save_rms(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _, weight_offset, frozen, engine = inputs
    _save(ctx, x, weight, None, weight_offset, frozen, engine, None, output[1])


def _differentiate_rms(ctx: Any, grad_y: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None, None)
    needs = [bool(need) for need in ctx.needs_input_grad[:2]]
    return _differentiate(ctx, grad_y, [*needs, False])[:2]


def _save_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _, frozen, engine = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, x, weight, bias, 0.0, frozen, engine, output[1], output[2])


def _differentiate_layer(ctx: Any, grad_y: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None, None, None)
    return _differentiate(ctx, grad_y, [bool(need) for need in ctx.needs_input_grad[:3]])


_rms_norm = operators.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset, bool frozen, str engine) -> (Tensor, Tensor)",
    _run_rms_norm,
    _fake_rms_norm,
    _save_rms,
    _differentiate_rms,
)
_layer_norm = operators.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool frozen, str engine) "
    "-> (Tensor, Tensor, Tensor)",
    _run_layer_norm,
    _fake_layer_norm,
    _save_layer,
    _differentiate_layer,
)


def _backward_of_several(grads: torch.Tensor, *others: Any) -> tuple[Gradient, ...] | None:
    """The backward for gradients with one dimension more in front."""
    *_, engine, needs = others
    return _run_norm_backward(grads, *others) if engines.takes_several(engine) and not (needs[1] or needs[2]) else None


_norm_backward = operators.define(
    "norm_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor? mean, Tensor inverse, float weight_offset, "
    "bool frozen, str engine, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _run_norm_backward,
    _fake_norm_backward,
    several=_backward_of_several,
)


def _check(x: torch.Tensor, eps: float, *parameters: tuple[str, torch.Tensor | None]) -> None:
    check_tensor("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r:.80}")
    for name, parameter in parameters:
        if parameter is None:
            continue
        check_tensor(name, parameter)
        if tuple(parameter.shape) != (x.shape[-1],):
            raise ValueError(
                f"{name} must have the shape of x's last dimension [{x.shape[-1]}], got {tuple(parameter.shape)}"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {parameter.device}")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    frozen: bool = False,
    engine: Engine = "auto",
) -> torch.Tensor:
    """RMS norm whose rms may be a constant of the backward.

    Forward, with ``r = sqrt(mean(x^2) + eps)`` and ``n = x / r``::

        y = n * (weight + weight_offset)

    Backward, with ``g = dy * (weight + weight_offset)``::

        dx = (g - n * mean(g * n)) / r          frozen: dx = g / r
        dweight = sum over rows of dy * n

    Args:
        x: ``[..., D]``, float32, float64, bfloat16 or float16.
        weight: ``[D]``, or None for 1.
        eps: >= 0, in units of x squared.
        weight_offset: 1 for models that store ``weight - 1`` (Gemma).
        frozen: whether r is a constant of the backward.
        engine: as in :func:`gim_kernels.attention`; under ``"composed"``, which is attention alone, that of ``"auto"``.

    Returns:
        ``[..., D]`` in x's dtype.

    Raises:
        TypeError: a dtype that is not floating point.
        ValueError: shapes, devices or numbers that do not fit.
        RuntimeError: as :func:`gim_kernels.engines.check_transforms`.

    Numerics: computed in float32 (float64 for float64) and rounded once; deterministic. Frozen, and with a weight that
    needs no gradient, one number per row is kept for the backward and not x.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467; frozen: Ali et al. 2022, arXiv 2202.07304.
    """
    _check(x, eps, ("weight", weight))
    if not is_between(-math.inf, weight_offset, math.inf):
        raise ValueError(f"weight_offset must be a finite number, got {weight_offset!r:.80}")
    engines.check_transforms("rms_norm", x, weight)
    y, _ = _rms_norm(x, weight, float(eps), float(weight_offset), bool(frozen), engines.choose_pointwise(engine, x))
    return y


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    frozen: bool = False,
    engine: Engine = "auto",
) -> torch.Tensor:
    """Layer norm over the last dimension whose standard deviation may be a constant of the backward.

    Forward, with ``s = sqrt(var(x) + eps)`` (biased variance) and ``n = (x - mean(x)) / s``::

        y = n * weight + bias

    Backward, with ``g = dy * weight``::

        dx = (g - mean(g) - n * mean(g * n)) / s          frozen: dx = (g - mean(g)) / s
        dweight = sum over rows of dy * n,  dbias = sum over rows of dy

    Args:
        x: ``[..., D]``, float32, float64, bfloat16 or float16.
        weight: ``[D]``, or None for 1.
        bias: ``[D]``, or None for 0.
        eps: >= 0, in units of x squared.
        frozen: whether s is a constant of the backward; the mean never is.
        engine: as in :func:`rms_norm`.

    Returns:
        ``[..., D]`` in x's dtype.

    Raises:
        TypeError: a dtype that is not floating point.
        ValueError: shapes, devices or numbers that do not fit.
        RuntimeError: as :func:`gim_kernels.engines.check_transforms`.

    Numerics: computed in float32 (float64 for float64) and rounded once; deterministic. Frozen, and with a weight that
    needs no gradient, one number per row is kept for the backward and not x.

    Source: Ba et al. 2016, arXiv 1607.06450; frozen: Ali et al. 2022, arXiv 2202.07304.
    """
    _check(x, eps, ("weight", weight), ("bias", bias))
    engines.check_transforms("layer_norm", x, weight, bias)
    y, _, _ = _layer_norm(x, weight, bias, float(eps), bool(frozen), engines.choose_pointwise(engine, x))
    return y
