"""Attention backward on a GPU under one of three softmax rules: one kernel over query tiles, one over key tiles.

The query kernel finds what the gradient of the scores needs to know about each row, and the gradients of query and
sinks. The key kernel finds the gradients of key and value; where too few of its programs would run, several share the
query heads of a key head, and their sums are folded. Either does only what was asked for; there is no preprocessing
pass, and there are no atomics: every sum has one order.

Tiles are read through tensor descriptors (TMA) where :func:`gim_kernels.triton.launch.described` allows it, and through
plain pointers elsewhere: strided views of any alignment work.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from gim_kernels.triton import tiles
from gim_kernels.triton.attention_fold import fold_parts
from gim_kernels.triton.attention_grad_key_value import grad_key_value_variant
from gim_kernels.triton.attention_grad_query import grad_query_variant
from gim_kernels.triton.device import guard
from gim_kernels.triton.dispatch import Launch, Plans
from gim_kernels.triton.launch import (
    as_walked,
    check_attention,
    described,
    hiding_window,
    key_section,
    matrices,
    query_section,
    readable,
    score_factors,
    strides,
    unit_stride,
)
from gim_kernels.triton.order import members_of
from gim_kernels.triton.rows import contiguous
from gim_kernels.triton.tiles import Rule
from gim_kernels.types import Options


def rule_of(
    softmax_backward: str, temperature: float, dtype: torch.dtype, grad_sinks: bool = False
) -> tuple[Rule, float]:
    """The kernels' rule and temperature for the public arguments; ``grad_sinks``: whether that gradient is wanted."""
    if softmax_backward == "constant":
        return "constant", 1.0
    if softmax_backward == "exact" or temperature == 1.0:
        # rowsum(dO * O) is delta up to the rounding of O. In two bytes that is below the rounding of everything else;
        # float32 takes the sum over the keys, as for any other temperature; so does the gradient of the sinks, a sum of
        # nothing but deltas, whose rounding would be all that is left where they cancel.
        return ("warm" if dtype == torch.float32 or grad_sinks else "exact"), 1.0
    if temperature == 2.0:
        return "square", 2.0
    return ("warm" if temperature > 1.0 else "sharp"), temperature


class _Over(NamedTuple):
    """A launch of the kernel over key tiles, and what it writes.

    Args:
        launch: the kernel.
        grad_key, grad_value: whether it writes these gradients.
        parts: shape of the sums of parts, ``[gradients, parts, B, HK, S, D]``; None where there are no parts.
    """

    launch: Launch
    grad_key: bool
    grad_value: bool
    parts: tuple[int, ...] | None


class _Plan(NamedTuple):
    """What the backward does for tensors of given layouts.

    Args:
        over_queries: the launch of the kernel over query tiles, None where nothing asks for it.
        over_keys: those of the kernel over key tiles.
        writes: whether a kernel writes the gradients of query, key, value and sinks.
        copies_first: whether grad_out, query, key or value must be copied before.
        copies: whether the gradient of query, key or value is written elsewhere, and must be copied afterwards.
        hand_over, norm: whether the first kernel writes for the second, and whether a norm is part of that.
    """

    over_queries: Launch | None
    over_keys: tuple[_Over, ...]
    writes: tuple[bool, bool, bool, bool]
    copies_first: bool
    copies: bool
    hand_over: bool
    norm: bool


class _Asked(NamedTuple):
    """What both kernels are launched for.

    Args:
        read: grad_out, query, key and value by name, as they are walked.
        architecture: of the device.
        rule: of the softmax.
        mask: whether it is causal, has a window, and is capped.
        key_range: whether there is one.
        by_descriptor: whether matrices are read through tensor descriptors.
        arguments: that both kernels take.
    """

    read: dict[str, torch.Tensor]
    architecture: str
    rule: Rule
    mask: tuple[bool, bool, bool]
    key_range: bool
    by_descriptor: bool
    arguments: dict[str, Any]


def _query_launch(
    asked: _Asked,
    out: torch.Tensor,
    place: torch.Tensor,
    sinks: torch.Tensor | None,
    writes: tuple[bool, bool, bool],
    factor: float,
) -> Launch | None:
    """The launch over query tiles, None where nothing asks for it.

    Args:
        asked: of both kernels.
        out: of the forward.
        place: has the layout of the gradient of query.
        sinks: of the heads.
        writes: whether it writes the gradients of query and of sinks, and what the kernel over key tiles reads.
        factor: of the gradient of query.
    """
    if not any(writes):
        return None
    query, key = asked.read["query"], asked.read["key"]
    batch, heads, queries, size = query.shape
    variant = grad_query_variant(
        asked.architecture,
        query.dtype,
        size,
        asked.rule,
        *asked.mask,
        None if sinks is None else sinks.dtype,
        asked.key_range,
        *writes,
        asked.by_descriptor,
    )
    tiles_t = triton.cdiv(queries, variant.constants["BLOCK_T"])
    return Launch(
        variant,
        tiles_t * batch * heads,
        **asked.arguments,
        **matrices(variant, **asked.read),
        section=query_section(tiles_t, query, key, asked.mask[0]),
        **strides("out", out, "t"),
        **strides("grad_query", place, "t"),
        grad_factor=factor,
    )


def _key_launches(
    asked: _Asked,
    places: tuple[torch.Tensor, torch.Tensor],
    writes: tuple[bool, bool],
    factors: tuple[float, float],
) -> tuple[_Over, ...]:
    """The launches over key tiles; ``places`` have the layouts of the gradients of key and value."""
    query, key = asked.read["query"], asked.read["key"]
    batch, key_heads, keys, size = key.shape
    causal, _, capped = asked.mask
    together = tiles.attention_tile(
        "grad_key_value", asked.architecture, size, query.dtype, capped, asked.by_descriptor
    )
    launches = [writes]
    if all(writes) and together.split:
        launches = [(False, True), (True, False)]
    found = []
    for grad_key, grad_value in launches:
        if not grad_key and not grad_value:
            continue
        variant = grad_key_value_variant(
            asked.architecture,
            query.dtype,
            size,
            asked.rule if grad_key else "constant",
            *asked.mask,
            asked.key_range,
            grad_key,
            grad_value,
            asked.by_descriptor,
        )
        block_t, block_s = variant.constants["BLOCK_T"], variant.constants["BLOCK_S"]
        tiles_s, columns, group = triton.cdiv(keys, block_s), batch * key_heads, asked.arguments["group"]
        window = asked.arguments["window"]
        members = members_of(query.shape[2], keys, window, causal, block_t, block_s, columns, group)
        parts = group // members
        shape = (grad_key + grad_value, parts, *key.shape) if parts > 1 else None
        # Sums of parts are contiguous.
        to_key, to_value = places if shape is None else (torch.empty(key.shape, device="meta"),) * 2
        launch = Launch(
            variant,
            tiles_s * columns * parts,
            **asked.arguments,
            **matrices(variant, **asked.read),
            **strides("grad_key", to_key, "s"),
            **strides("grad_value", to_value, "s"),
            grad_stride_part=key.numel(),
            members=members,
            section=key_section(tiles_s, members, query, columns * parts, causal),
            key_factor=factors[0],
            value_factor=factors[1],
        )
        found.append(_Over(launch, grad_key, grad_value, shape))
    return tuple(found)


@Plans
def backward_plans(
    tensors: tuple[torch.Tensor, ...],
    options: Options,
    softmax_backward: str,
    temperature: float,
    grad_scale: tuple[float, float, float],
    needs: tuple[bool, bool, bool, bool],
) -> _Plan:
    """The plan for grad_out, query, key, value, sinks, key range and out; the rest as :func:`attention_backward`."""
    grad_out, query, key, value, sinks, key_range, out = tensors
    check_attention(query, key, value)
    need_query, need_key, need_value, need_sinks = needs
    rule, temperature = rule_of(softmax_backward, temperature, query.dtype, need_sinks)
    # A gradient that nothing reaches is 0 without any work.
    reached = query.numel() > 0
    scored = reached and rule != "constant"
    writes = (
        need_query and scored,
        need_key and scored and key.numel() > 0,
        need_value and reached and key.numel() > 0,
        need_sinks and scored,
    )
    # As the gradients are; where their rows cannot be walked, as what takes their place.
    places = [torch.empty_like(x, device="meta") for x in (query, key, value)]
    copies = any(write and not readable(place) for write, place in zip(writes, places, strict=False))
    to_query, to_key, to_value = (as_walked(place) for place in places)

    architecture = tiles.architecture_of(query)
    named = {"grad_out": grad_out, "query": query, "key": key, "value": value}
    read = {name: as_walked(x) for name, x in named.items()}
    factor, inner = score_factors(options)
    window = hiding_window(options, key.shape[2])
    arguments: dict[str, Any] = {
        "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "queries": query.shape[2],
        "keys": key.shape[2],
        "window": window,
        "factor": factor,
        "inner": inner,
        "inverse_temperature": 1.0 / temperature,
    }
    mask = (options.causal, window is not None, inner is not None)
    by_descriptor = described(architecture, inner, key_range, *read.values())
    asked = _Asked(read, architecture, rule, mask, key_range is not None, by_descriptor, arguments)
    factors = (options.scale * grad_scale[0], options.scale * grad_scale[1], grad_scale[2])
    over_queries = _query_launch(asked, out, to_query, sinks, (writes[0], writes[3], writes[1]), factors[0])
    over_keys = _key_launches(asked, (to_key, to_value), writes[1:3], factors[1:])
    copies_first = not all(map(readable, tensors[:4]))
    return _Plan(over_queries, over_keys, writes, copies_first, copies, writes[1], rule != "exact")


def _run_over_keys(
    over: _Over,
    read: list[torch.Tensor],
    key_range: torch.Tensor | None,
    lse: torch.Tensor,
    to: list[torch.Tensor | None],
    rows: list[torch.Tensor | None],
) -> None:
    """Run a launch over key tiles, which writes to ``to[1]`` and ``to[2]``, and fold what its parts summed."""
    places = (to[1] if over.grad_key else None, to[2] if over.grad_value else None)
    # Without parts nothing is written to the sums.
    partial = None if over.parts is None else torch.empty(over.parts, dtype=torch.float32, device=lse.device)
    handed = rows if over.grad_key else (lse, None, None)
    over.launch(*read, key_range, *places, lse if partial is None else partial, *handed)
    if partial is not None:
        for sums, whole in zip(partial, [place for place in places if place is not None], strict=True):
            fold_parts(sums, whole)


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
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """See :class:`gim_kernels.types.AttentionEngine`; nothing is read back to the host.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gim_kernels.triton.launch.check_attention`.

    Numerics: scores, row sums and gradients accumulate in float32; both score matrices are rounded to query's dtype
        for their products; deterministic, bit for bit.
    """
    needs = (*needs[:3], needs[3] and sinks is not None)
    tensors = (grad_out, query, key, value, sinks, key_range, out)
    plan = backward_plans(tensors, options, softmax_backward, temperature, grad_scale, needs)
    inputs = (query, key, value, sinks)
    grads: list[torch.Tensor | None] = [
        None if x is None or not need else torch.empty_like(x) if write and i < 3 else torch.zeros_like(x)
        for i, (x, need, write) in enumerate(zip(inputs, needs, plan.writes, strict=True))
    ]
    # Where the kernels write: gradients, or memory whose rows have unit stride; the sinks' for each query.
    to = [grad if write else None for grad, write in zip(grads, plan.writes, strict=True)]
    if plan.copies:
        to[:3] = [x if x is None or readable(x) else x.new_empty(x.shape) for x in to[:3]]
    if plan.writes[3]:
        to[3] = torch.empty_like(lse)
    read = [grad_out, query, key, value]
    if plan.copies_first:
        read = list(map(unit_stride, read))
    sinks, key_range = contiguous(sinks), contiguous(key_range)
    rows = [torch.empty_like(lse) if plan.hand_over and (i != 1 or plan.norm) else None for i in range(3)]
    with guard(query):
        if plan.over_queries is not None:
            plan.over_queries(*read, sinks, key_range, out, lse, to[0], to[3], *rows)
        for over in plan.over_keys:
            _run_over_keys(over, read, key_range, lse, to, rows)
    if plan.copies:
        for grad, written in zip(grads[:3], to, strict=False):
            if grad is not None and written is not None and written is not grad:
                grad.copy_(written)
    if grads[3] is not None and to[3] is not None:
        grads[3].copy_(to[3].sum((0, 2)))
    return grads[0], grads[1], grads[2], grads[3]
