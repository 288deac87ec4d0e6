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
from gim_kernels.types import DTYPES, Engine, Gradient, Options

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
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, T, D], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
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


def _positive(name: str, number: float | None) -> None:
    if number is not None and (not isinstance(number, int | float) or not 0 < number < math.inf):
        raise ValueError(f"{name} must be a finite number > 0, got {number!r}")


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
    _positive("softcap", softcap)
    if softmax_backward not in SOFTMAX_BACKWARDS:
        raise ValueError(f"softmax_backward must be one of {SOFTMAX_BACKWARDS}, got {softmax_backward!r}")
    _positive("temperature", temperature)
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"temperature must be from {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}, got {temperature!r}"
        )
    if len(grad_scale) != 3 or not all(math.isfinite(factor) for factor in grad_scale):
        raise ValueError(f"grad_scale must be three finite factors for q, k and v, got {grad_scale!r}")
    if sinks is not None:
        if tuple(sinks.shape) != (query.shape[1],):
            raise ValueError(f"sinks must have shape [HQ] = [{query.shape[1]}], got {tuple(sinks.shape)}")
        if sinks.dtype not in DTYPES:
            raise TypeError(f"sinks must be floating point, got {sinks.dtype}")
        if sinks.device != query.device:
            raise ValueError(f"sinks must be on query's device {query.device}, got {sinks.device}")
    if key_range is not None:
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
        1.0 / math.sqrt(size) if scale is None else float(scale),
        bool(causal),
        window,
        None if softcap is None else float(softcap),
        softmax_backward,
        float(temperature),
        factors,
        chosen,
    )
    return out if size == width else out[..., :width]


def with_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """What torch's attention is called with as :func:`attention` takes it, and the shape of torch's output.

    As in torch, dimensions before the last two are broadcast against one another. With ``enable_gqa`` the heads of keys
    and of values, which may be as many as they like, are shared by those of queries instead. Nothing is copied that
    :func:`attention` can share.

    Args:
        query, key, value: ``[..., T or S, D]``, of 2 dimensions or more; of the first of 3, each is a row of a batch.
        enable_gqa: allow fewer heads of keys and values; the first of 3 dimensions is then heads.

    Raises:
        ValueError: the shapes do not fit.
    """
    given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("QKV", (query, key, value), strict=True))
    count = max(x.dim() for x in (query, key, value))
    if min(x.dim() for x in (query, key, value)) < 2:
        raise ValueError(f"query, key and value must have 2 dimensions or more, got {given}")
    query, key, value = (_four(x, count, enable_gqa) for x in (query, key, value))
    heads, *shared = (x.shape[-3] for x in (query, key, value))
    if not enable_gqa:
        together = max(heads, *shared)
        for name, other in zip(("key", "value"), shared, strict=True):
            if any(one not in (1, together) for one in (heads, other)):
                raise ValueError(f"{name} must have query's {heads} heads unless enable_gqa is True, got {other}")
        heads = together
        query = query.expand(*query.shape[:-3], heads, -1, -1)
        if shared[0] != shared[1]:
            key, value = (x.expand(*x.shape[:-3], heads, -1, -1) for x in (key, value))
    elif shared[0] != shared[1]:
        if any(one == 0 or heads % one for one in shared):
            raise ValueError(f"query heads must be a multiple of key heads and of value heads, got {given}")
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError as error:
        raise ValueError(f"query, key and value must have batch sizes that are the same or 1, got {given}") from error
    query, key, value = (
        x if x.dim() == 4 and x.shape[:1] == lead else x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])
        for x in (query, key, value)
    )
    shape = (*lead, query.shape[2], value.shape[-1])
    if not _is_batch(count, enable_gqa):
        shape = (*lead, heads, *shape[-2:])
    return query, key, value, shape[-count:]


def _is_batch(count: int, enable_gqa: bool) -> bool:
    """Whether the third last of ``count`` dimensions is a batch, for want of another, and not heads."""
    return count < 4 and not enable_gqa


def _four(x: torch.Tensor, count: int, enable_gqa: bool) -> torch.Tensor:
    """A tensor that is broadcast to ``count`` dimensions, with heads as its third last, of 4 dimensions or more."""
    x = x[(None,) * (count - x.dim())]
    x = x.unsqueeze(-3) if _is_batch(count, enable_gqa) else x
    return x[(None,) * (4 - x.dim())]


def mask_with_heads(mask: torch.Tensor, shape: tuple[int, ...], enable_gqa: bool) -> torch.Tensor:
    """A mask of torch's attention, whose output has that shape, as ``[B or 1, H or 1, T or 1, S or 1]``.

    Raises:
        ValueError: it is not one that torch broadcasts.
    """
    if not 2 <= mask.dim() <= len(shape):
        raise ValueError(f"attn_mask must have 2 to {len(shape)} dimensions, got shape {tuple(mask.shape)}")
    wide = _four(mask, len(shape), enable_gqa)
    if wide.dim() == 4:
        return wide
    lead = wide.shape[:-3]
    if any(one not in (1, size) for one, size in zip(lead, shape, strict=False)):
        raise ValueError(f"attn_mask must fit the batch sizes {shape[:-3]}, got shape {tuple(mask.shape)}")
    if any(one != 1 for one in lead):
        wide = wide.expand(*shape[:-3], *wide.shape[-3:])
    return wide.reshape(-1, *wide.shape[-3:])


def _range_of_mask(attn_mask: torch.Tensor, batch: int, keys: int) -> torch.Tensor:
    """The key range ``[B, 2]`` that a boolean mask ``[B or 1, 1, 1, S]`` (True: visible) stands for."""
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean (True: visible), got {attn_mask.dtype}: an additive mask cannot be "
            "applied in O(T) memory"
        )
    if attn_mask.dim() != 4 or attn_mask.shape[1:] != (1, 1, keys) or attn_mask.shape[0] not in (1, batch):
        raise ValueError(
            f"attn_mask must have shape [B, 1, 1, S] = [{batch}, 1, 1, {keys}], one bit for each key, got "
            f"{tuple(attn_mask.shape)}: a mask of its own for every query is O(T^2). Use is_causal=True, or "
            "gim_kernels.attention with window and key_range."
        )
    return engines.key_range_of(attn_mask[:, 0, 0].expand(batch, keys), "attn_mask")


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softmax_backward: SoftmaxBackward = "exact",
    temperature: float = 2.0,
    grad_scale: Sequence[float] = (1.0, 1.0, 1.0),
    engine: Engine = "auto",
) -> torch.Tensor:
    """:func:`attention` behind the signature of ``torch.nn.functional.scaled_dot_product_attention``.

    A front end that calls torch's function swaps one name and adds the rule. As in torch, ``is_causal`` is aligned
    top-left: query i sees keys up to i. What cannot be had in O(T) memory is refused, never approximated.

    Args:
        query: ``[..., HQ, T, D]``; leading dimensions are a batch. With three dimensions, ``[N, T, D]``; with two,
            ``[T, D]``.
        key: ``[..., HK, S, D]``; heads and leading dimensions that are 1 or missing are broadcast, here and in query
            and value.
        value: ``[..., HK, S, DV]``.
        attn_mask: None, or boolean ``[B, 1, 1, S]``, True for the keys that exist, without holes; leading dimensions as
            query has them.
        dropout_p: must be 0.
        is_causal: top-left causal mask; excludes ``attn_mask``.
        scale: factor on the scores; None is ``1 / sqrt(D)``.
        enable_gqa: allow fewer key heads than query heads.
        softmax_backward: as in :func:`attention`.
        temperature: as in :func:`attention`.
        grad_scale: as in :func:`attention`.
        engine: as in :func:`attention`.

    Returns:
        ``[..., HQ, T, DV]``.

    Raises:
        TypeError: as :func:`attention`; an additive mask.
        ValueError: as :func:`attention`; dropout, a mask for every query, a mask with holes, a mask together with
            ``is_causal``, different head counts without ``enable_gqa``.

    Source: torch's documentation of the function of the same name.
    """
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0: attributions are deterministic, got {dropout_p!r}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None when is_causal is True, as in torch")
    query, key, value, shape = with_heads(query, key, value, enable_gqa)
    queries, keys = query.shape[2], key.shape[2]
    key_range = None
    if attn_mask is not None:
        key_range = _range_of_mask(mask_with_heads(attn_mask, shape, enable_gqa), query.shape[0], keys)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return attention(
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            key_range=key_range,
            softmax_backward=softmax_backward,
            temperature=temperature,
            grad_scale=grad_scale,
            engine=engine,
        )

    if not is_causal or queries == keys:
        out = attend(query, key, value, is_causal)
    elif queries < keys:  # top-left: keys past the last query are seen by nobody
        out = attend(query, key[:, :, :queries], value[:, :, :queries], True)
    else:  # queries past the last key see every key
        square = attend(query[:, :, :keys], key, value, True)
        out = torch.cat([square, attend(query[:, :, keys:], key, value, False)], dim=2)
    return out.reshape(shape)
