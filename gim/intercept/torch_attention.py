"""Attention that a model leaves to a function of torch's: these are its handlers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

import gim_kernels
from gim.intercept.attention import attend, gim_attention, options_of, through_scores, weights_of
from gim.intercept.frames import running
from gim.intercept.masks import KeyPattern, intersection, recognise
from gim.intercept.session import Session
from gim_kernels import told
from gim_kernels.sdpa import mask_with_heads, with_heads

_NAME = "nn.MultiheadAttention"


def _dense(
    session: Session,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyPattern | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention with the rules of the session; ``is_causal`` is aligned top-left, as in torch."""
    options: dict[str, Any] = {"scale": scale, **options_of(session.rules, session.engine)}
    if mask is None:
        query, key = through_scores(query, key, session.rules.softmax)
        out = gim_kernels.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, enable_gqa=enable_gqa, **options
        )
    else:
        query, key, value, shape = with_heads(query, key, value, enable_gqa)
        out = attend(query, key, value, mask, **options).reshape(shape)
    return session.heads(out)


def _scaled_dot_product_attention(
    session: Session,
    func: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    name = "F.scaled_dot_product_attention"
    frame = running.frames[-1]
    if frame.pattern is not None and attn_mask is None:
        out, _ = gim_attention(
            frame.module, query, key, value, frame.pattern, scaling=scale, dropout=dropout_p, is_causal=is_causal
        )
        return out.transpose(1, 2)

    found: KeyPattern | str | None = None
    reason, because = "", None
    try:
        if dropout_p != 0.0:
            reason = f"{name} was called with dropout_p={dropout_p:g}: call model.eval() and pass 0"
        elif attn_mask is not None and is_causal:
            reason = f"{name} was called with attn_mask and is_causal"
        elif attn_mask is not None:
            q, k, _, shape = with_heads(query, key, value, enable_gqa)
            found = recognise(mask_with_heads(attn_mask, shape, enable_gqa), q.shape[0], q.shape[2], k.shape[2])
        if isinstance(found, str):
            reason = f"attn_mask of {name} {found}"
        elif not reason:
            with told.listening() as ran:
                out = _dense(session, query, key, value, found, is_causal, scale, enable_gqa)
    except (TypeError, ValueError) as error:
        reason, because = f"{name}: {error}", error
    if reason:
        session.refuse(reason, because)
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    session.fire("attention", f"call of {name}", str(ran))
    return out


#: What torch's function is called with.
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention_forward(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``nn.MultiheadAttention``, whose queries, keys and values exist once per head between projection and softmax.

    With ``need_weights`` the T x S weights that the caller asked for are computed beside the output, under the same
    rule; the output itself stays in O(T) memory.
    """
    bound = _MULTI_HEAD.bind(*args, **named)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    reason = _refusal(given)
    if reason:
        session.refuse(f"{_NAME} {reason}")
    if reason or (given.is_causal and given.attn_mask is None):
        return func(*args, **named)  # in the second case torch raises its own error
    batched = given.query.dim() == 3
    if not batched:
        given.query, given.key, given.value = (x[:, None] for x in (given.query, given.key, given.value))
        given.key_padding_mask = None if given.key_padding_mask is None else given.key_padding_mask[None]
    q, k, v = _heads(given)
    # In this case torch ignores the mask.
    causal_hint = given.is_causal and given.key_padding_mask is None and not given.need_weights
    pattern = None if causal_hint else _pattern_of(given, q.shape[0], q.shape[2], k.shape[2])
    if isinstance(pattern, str):
        session.refuse(pattern)
        return func(*args, **named)
    try:
        with told.listening() as ran:
            out = _dense(session, q, k, v, pattern, causal_hint, None, False)
    except (TypeError, ValueError) as error:
        session.refuse(f"{_NAME}: {error}", error)
        return func(*args, **named)
    shown = _shown(session, q, k, pattern, given.average_attn_weights) if given.need_weights else None
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), given.out_proj_weight, given.out_proj_bias)
    session.fire("attention", f"call of {_NAME}", str(ran))
    return (out, shown) if batched else (out[:, 0], None if shown is None else shown[0])


def _refusal(given: Any) -> str:
    """Why a call of torch's multi-head attention is refused, in words; empty where it is not."""
    if given.training and given.dropout_p > 0.0:
        return f"has dropout {given.dropout_p:g} in training mode: call model.eval()"
    if given.static_k is not None or given.static_v is not None:
        return "was called with static_k or static_v, which gim does not apply"
    masked = given.attn_mask is not None or given.key_padding_mask is not None or given.is_causal
    if masked and (given.bias_k is not None or given.add_zero_attn):
        return "has bias_k or add_zero_attn together with a mask, which gim does not apply"
    if given.query.is_nested or given.query.dim() not in (2, 3):
        return f"was called with a nested query or one of {given.query.dim()} dimensions"
    return ""


def _heads(given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[B, H, T, D]`` of a call of torch's multi-head attention."""
    batch = given.query.shape[1]
    if given.use_separate_proj_weight:
        weights = (given.q_proj_weight, given.k_proj_weight, given.v_proj_weight)
    else:
        weights = given.in_proj_weight.chunk(3)
    biases = (None, None, None) if given.in_proj_bias is None else given.in_proj_bias.chunk(3)
    inputs = (given.query, given.key, given.value)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))  # [T, B, E]
    if given.bias_k is not None and given.bias_v is not None:
        k, v = (torch.cat([x, row.expand(1, batch, -1)]) for x, row in ((k, given.bias_k), (v, given.bias_v)))
    if given.add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(1, batch, x.shape[-1])]) for x in (k, v))
    q, k, v = (x.reshape(x.shape[0], batch, given.num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    return q, k, v


def _pattern_of(given: Any, batch: int, queries: int, keys: int) -> KeyPattern | str | None:
    """The pattern of both masks of a call of torch's multi-head attention; in words why there is none of one."""
    pattern = None
    for argument, mask in (("attn_mask", given.attn_mask), ("key_padding_mask", given.key_padding_mask)):
        if mask is None:
            continue
        # In this function True hides a key, the opposite of F.scaled_dot_product_attention.
        mask = ~mask if mask.dtype == torch.bool else mask
        if argument == "key_padding_mask":
            mask = mask[:, None, None]
        elif mask.dim() == 3:
            mask = mask.reshape(batch, given.num_heads, *mask.shape[1:])
        else:
            mask = mask[None, None]
        found = recognise(mask, batch, queries, keys)
        if isinstance(found, str):
            return f"{argument} of {_NAME} {found}"
        if pattern is None:
            pattern = found
        else:
            padding = None if found.key_range is None else found.key_range.clamp(max=pattern.keys)
            pattern = dataclasses.replace(pattern, key_range=intersection(pattern.key_range, padding))
    return pattern


def _shown(
    session: Session, q: torch.Tensor, k: torch.Tensor, pattern: KeyPattern | None, average: bool
) -> torch.Tensor:
    """Attention weights ``[B, H, T, S]``, or their average over heads, which the caller asked for, by the same rule."""
    session.report.note(f"{running.frames[-1]}: need_weights=True makes T x S weights beside the output")
    pattern = pattern or KeyPattern(q.shape[2], k.shape[2], False, None, None)
    shown = weights_of(q, k, pattern, **options_of(session.rules, session.engine))
    return shown.mean(1) if average else shown


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention_forward,
}
