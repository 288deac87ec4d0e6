"""Attention with a choice of softmax backward: checks, choice of engine, autograd.

The operator ``gim_kernels::attention`` is registered with torch.library, so that ``torch.compile`` sees one node and
selective checkpointing can keep its outputs by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from gim_kernels import engines, operators
from gim_kernels.arguments import are_finite, check_tensor, choice, is_between, number
from gim_kernels.types import Engine, Gradient, Options

SoftmaxBackward = Literal["exact", "temperature", "constant"]
#: Below the lowest, the rounding of float32 scores over T is no longer a number that exp takes; above the highest,
#: 1 / T is none.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-5, 1e30
SOFTMAX_BACKWARDS: tuple[SoftmaxBackward, ...] = ("exact", "temperature", "constant")

_LIBRARY_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? key_range, float scale, bool causal, "
    "int? window, float? softcap, str softmax_backward, float temperature, float[] grad_scale, str engine"
)


#: Made once for equal arguments: a model's layers share them.
_options = functools.lru_cache(256)(Options)


def _run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    softmax_backward: SoftmaxBackward,
    temperature: float,
    grad_scale: Sequence[float],
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = _options(scale, causal, window, softcap)
    with engines.as_given(query):
        return engines.attention(engine).attention_forward(query, key, value, sinks, key_range, options)


def _fake_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, size = query.shape
    out = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out, query.new_empty(batch, heads, queries, dtype=wide)


def _run_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    softmax_backward: SoftmaxBackward,
    temperature: float,
    grad_scale: Sequence[float],
    engine: Engine,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[Gradient, Gradient, Gradient, Gradient]:
    with engines.as_given(query):
        return engines.attention(engine).attention_backward(
            grad_out,
            query,
            key,
            value,
            sinks,
            key_range,
            out,
            lse,
            _options(scale, causal, window, softcap),
            softmax_backward=softmax_backward,
            temperature=temperature,
            grad_scale=(grad_scale[0], grad_scale[1], grad_scale[2]),
            needs=(needs[0], needs[1], needs[2], needs[3]),
        )


def _fake_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    needs = rest[-1]
    inputs = (query, key, value, sinks)
    return tuple(
        torch.empty_like(x) if need and x is not None else grad_out.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, sinks, key_range, *options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.options = tuple(options)
    ctx.save_for_backward(query, key, value, sinks, key_range, out, lse)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 5
    query, key, value, sinks, key_range, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = _attention_backward(grad_out, query, key, value, sinks, key_range, *ctx.options, out, lse, needs)
    return (*[grad if need else None for grad, need in zip(grads, needs, strict=True)], None)


_attention = operators.define(
    f"attention({_LIBRARY_ARGUMENTS}) -> (Tensor, Tensor)", _run_attention, _fake_attention, _save, _differentiate
)


def _backward_of_several(
    grads: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, ...] | None:
    """The backward for ``[N, 1, HQ, T, D]``: rows of a batch, all of one query, key and value."""
    sinks, key_range, *options, engine, out, lse, needs = others
    if not engines.takes_several(engine) or query.shape[0] != 1 or needs[3]:
        return None
    count = grads.shape[0]
    query, key, value, out = (x.expand(count, -1, -1, -1) for x in (query, key, value, out))
    if key_range is not None:
        key_range = key_range.expand(count, -1)
    inputs = (query, key, value, sinks, key_range)
    found = _attention_backward(grads[:, 0], *inputs, *options, engine, out, lse.expand(count, -1, -1), needs)
    return tuple(grad[:, None] if need else grad for grad, need in zip(found, needs, strict=True))


_attention_backward = operators.define(
    f"attention_backward(Tensor grad_out, {_LIBRARY_ARGUMENTS}, Tensor out, Tensor lse, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run_attention_backward,
    _fake_attention_backward,
    several=_backward_of_several,
)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, T, D], got shape {tuple(x.shape)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
    # Each look at a shape makes an object.
    (batch, heads, _, size), shape = query.shape, key.shape
    key_batch, key_heads, _, key_size = shape
    if shape[:3] != value.shape[:3]:
        raise ValueError(
            f"value must have key's shape but for its last axis, got key {tuple(shape)} and value {tuple(value.shape)}"
        )
    if batch != key_batch:
        raise ValueError(f"key must have query's batch size {batch}, got {key_batch}")
    if size != key_size:
        raise ValueError(f"key must have query's head size {size}, got {key_size}")
    if size == 0:
        raise ValueError("query must have a head size of at least 1, got 0")
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {heads} query heads and {key_heads} key heads"
        )


def _check_positive(name: str, x: float) -> None:
    if not is_between(0, x, math.inf):
        raise ValueError(f"{name} must be a finite number > 0, got {x!r:.80}")


def _check_options(
    query: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_range: torch.Tensor | None,
    softmax_backward: str,
    temperature: float,
    grad_scale: Sequence[float],
) -> None:
    wide = torch.promote_types(query.dtype, torch.float32)
    if scale is not None and not abs(scale) <= torch.finfo(wide).max:
        raise ValueError(f"scale must be finite in {wide}, the type of the scores, got {scale!r}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be an integer >= 1 or None, got {window!r}")
    if softcap is not None:
        _check_positive("softcap", softcap)
    choice("softmax_backward", softmax_backward, SOFTMAX_BACKWARDS)
    _check_positive("temperature", temperature)
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"temperature must be from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}, got {temperature!r}"
        )
    if not are_finite(grad_scale, 3):
        raise ValueError(f"grad_scale must be three finite factors for q, k and v, got {grad_scale!r}")
    if sinks is not None:
        check_tensor("sinks", sinks)
        if tuple(sinks.shape) != (query.shape[1],):
            raise ValueError(f"sinks must have shape [HQ] = [{query.shape[1]}], got {tuple(sinks.shape)}")
        if sinks.device != query.device:
            raise ValueError(f"sinks must be on query's device {query.device}, got {sinks.device}")
    if key_range is not None:
        if not isinstance(key_range, torch.Tensor):
            raise TypeError(f"key_range must be a tensor, got {type(key_range).__name__}")
        if tuple(key_range.shape) != (query.shape[0], 2):
            raise ValueError(f"key_range must have shape [B, 2] = [{query.shape[0]}, 2], got {tuple(key_range.shape)}")
        if key_range.dtype != torch.int32:
            raise TypeError(f"key_range must be int32, got {key_range.dtype}")
        if key_range.device != query.device:
            raise ValueError(f"key_range must be on query's device {query.device}, got {key_range.device}")


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
    softmax_backward: SoftmaxBackward = "exact",
    temperature: float = 2.0,
    grad_scale: Sequence[float] = (1.0, 1.0, 1.0),
    engine: Engine = "auto",
) -> torch.Tensor:
    """Multi-head attention in O(T) memory whose softmax has a backward of its own.

    Forward, with ``c`` the softcap::

        S = scale * Q K^T,  S' = c tanh(S / c) or S,  P = softmax(S'),  O = P V

    Backward, for the score gradient ``dS'`` (``dP = dO V^T``, ``P_T = softmax(S' / T)``)::

        temperature   dS' = P_T * (dP - rowsum(P_T * dP))      no factor 1 / T
        exact         the same with T = 1: the ordinary gradient
        constant      dS' = 0: softmax outputs are constants, only dV = P^T dO remains

    The forward does not depend on the rule, bit for bit. Rows that see no key give 0. Under ``torch.autocast`` query,
    key and value are cast as torch casts them for its own attention.

    Args:
        query: ``[B, HQ, T, D]``, float32, float64, bfloat16 or float16; any strides.
        key: ``[B, HK, S, D]``, HQ a multiple of HK; query head h reads key head ``h // (HQ / HK)``.
        value: ``[B, HK, S, DV]``; where DV is not D, the narrower ones are filled up with zeros.
        scale: factor on the scores, of any sign or 0; None is ``1 / sqrt(D)``.
        causal: query i sees keys up to ``i + S - T`` (aligned bottom-right).
        window: in keys; query i sees keys ``j > i + S - T - window`` only.
        softcap: bound of the scores, > 0, in units of the scores.
        sinks: ``[HQ]``, a score per head that takes probability and has no value.
        key_range: ``[B, 2]`` int32, the first and one past the last key that exist in each row.
        softmax_backward: the rule of the backward.
        temperature: T of the rule ``"temperature"``, from 1e-5 to 1e30.
        grad_scale: factors of the gradients of query, key and value.
        engine: ``"auto"``: Triton on a GPU, blockwise elsewhere. Or one by name: ``"triton"``; ``"blockwise"``, plain
            PyTorch on any device; ``"composed"``, calls of torch's own exact attention, without softcap and sinks;
            ``"reference"``, the specification, in O(T S) memory.

    Returns:
        ``[B, HQ, T, DV]`` in query's dtype.

    Raises:
        TypeError: a tensor of another dtype; the message names it.
        ValueError: shapes, devices or numbers that do not fit; the message names the argument, what was
            wanted and what came.
        NotImplementedError: the engine has no softcap or sinks, or no code in O(T) memory for these tensors.
        RuntimeError: the engine cannot run here; a Triton kernel gives other numbers than the reference when this
            process first uses it on a device; or a derivative is asked for in forward mode or by ``torch.func.grad``,
            which only :func:`gim_kernels.reference.attention` has.

    Numerics: scores, sums and accumulators are float32 (float64 for float64); deterministic, bit for bit, on one
    device. Errors are within twice those of eager PyTorch in the same dtype.

    Source: Edin et al. 2025, arXiv 2505.17630 (the rules); Dao 2023, arXiv 2307.08691 (the forward).
    """
    query, key, value = engines.autocast(query, key, value)
    _check_tensors(query, key, value)
    if scale is not None:
        scale = number("scale", scale)
    _check_options(query, scale, window, softcap, sinks, key_range, softmax_backward, temperature, grad_scale)
    factors = (float(grad_scale[0]), float(grad_scale[1]), float(grad_scale[2]))
    chosen = engines.choose(engine, query)
    engines.check_transforms("attention", query, key, value, sinks)
    size, width = query.shape[-1], value.shape[-1]
    if size != width:  # zeros change neither the scores nor the sums
        query, key, value = (F.pad(x, (0, max(size, width) - x.shape[-1])) for x in (query, key, value))
    out, _ = _attention(
        query,
        key,
        value,
        sinks,
        key_range,
        1.0 / math.sqrt(size) if scale is None else scale,
        bool(causal),
        window,
        None if softcap is None else float(softcap),
        softmax_backward,
        float(temperature),
        factors,
        chosen,
    )
    return out if size == width else out[..., :width]
