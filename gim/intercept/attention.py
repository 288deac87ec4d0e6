"""Attention: torch's functions, the interface of transformers, and scores that a model writes out itself.

``interface`` registers the implementation ``"gim"`` in transformers' attention and mask interfaces. Outside a context
it is ordinary attention in O(T) memory; inside one, the session that runs tells which rules to apply.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import gim_kernels
from gim.applied import UnsupportedModelError
from gim.intercept.flow import mark, origin
from gim.intercept.masks import KeyPattern, packed, recognise
from gim.intercept.session import Session, paused, running, session_here
from gim.intercept.sites import SITES
from gim.rules import GRADIENT, Rules
from gim_kernels import reference, told
from gim_kernels.reference import scale_gradient

#: Keyword arguments of the attention interface that do not change what attention computes.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "max_length_k",
        "max_length_q",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "use_cache",
        "num_items_in_batch",
    }
)


def gim_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: KeyPattern | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The entry of the attention interface.

    Args:
        module: the attention module that calls; its session holds the rules.
        query: ``[B, HQ, T, D]``; ``key`` and ``value``: ``[B, HK, S, D]``.
        attention_mask: what :func:`key_pattern` returned, or None.
        scaling: factor on the scores.
        dropout: must be 0.
        is_causal: used where ``attention_mask`` is None; else the module's own ``is_causal``.
        sliding_window: must agree with the mask.
        softcap: bound of the scores.
        s_aux: attention sinks ``[HQ]``.
        cu_seq_lens_q, cu_seq_lens_k: ``[N + 1]``, where the packed documents of a batch of one start, and its length.
        others: arguments that change nothing; any other is refused.

    Returns:
        ``[B, T, HQ, D]``, and None in place of attention weights; the weights ``[B, HQ, T, S]`` of a model whose own
        implementation has them, where a hook on the module or an argument asks for them.

    Raises:
        UnsupportedModelError: something that cannot be applied exactly; names the module.
    """
    session = session_here()
    name = type(module).__name__ if session is None else running.frames[-1].name
    shows = _shows_weights(module, others.pop("output_attentions", False))
    asked = sorted(key for key, given in others.items() if key not in HARMLESS and _matters(given))
    if asked:
        raise UnsupportedModelError(
            f"{name}: attention was called with {', '.join(asked)}, which gim does not know how to apply"
        )
    if dropout != 0.0:
        raise UnsupportedModelError(
            f"{name}: attention dropout is {dropout:g}: call model.eval(), attributions are deterministic"
        )
    with paused():
        pattern = _pattern(name, module, query, key, attention_mask, is_causal, sliding_window)
        if cu_seq_lens_q is not None:
            pattern = packed(name, pattern, cu_seq_lens_q, cu_seq_lens_k)
        return _through_kernels(module, session, query, key, value, pattern, scaling, softcap, s_aux, shows)


def _pattern(
    name: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: KeyPattern | torch.Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> KeyPattern:
    """Which keys the queries of :func:`gim_attention` see.

    Raises:
        UnsupportedModelError: the arguments contradict each other, or the mask is none.
    """
    if isinstance(attention_mask, KeyPattern):
        pattern = attention_mask
        if pattern.refused:
            raise UnsupportedModelError(f"{name}: its attention mask {pattern.refused}")
    elif attention_mask is None:
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
        pattern = KeyPattern(query.shape[2], key.shape[2], causal, sliding_window, None)
    else:
        raise UnsupportedModelError(
            f"{name}: attention was given a dense mask of shape {tuple(attention_mask.shape)}: only causal, "
            "windowed, bidirectional and padding masks exist in O(T) memory"
        )
    if (query.shape[2], key.shape[2]) != (pattern.queries, pattern.keys):
        raise UnsupportedModelError(
            f"{name}: the mask is for {pattern.queries} queries and {pattern.keys} keys, attention was called "
            f"with {query.shape[2]} and {key.shape[2]}"
        )
    window = pattern.window
    if (
        sliding_window is not None
        and pattern.reach not in (sliding_window, sliding_window - 1)
        and sliding_window != window
        and min(pattern.keys, sliding_window) != (min(pattern.keys, window) if window is not None else pattern.keys)
    ):
        raise UnsupportedModelError(
            f"{name}: attention was called with a window of {sliding_window} and a mask with {window}"
        )
    return pattern


def _through_kernels(
    module: nn.Module,
    session: Session | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: KeyPattern,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    shows: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What :func:`gim_attention` returns, its arguments checked and its mask a pattern."""
    rules = module.__dict__.get(RULES, GRADIENT) if session is None else session.rules
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": sinks,
        "softmax_backward": rules.softmax,
        "temperature": rules.temperature,
        "grad_scale": rules.qkv_scale,
        "engine": "auto" if session is None else session.engine,
    }
    spans: Spans | None = module.__dict__.get(SPANS)
    if spans is not None and spans.session is not session:
        spans = None
    plain = pattern.queries == pattern.keys and pattern.documents is None and pattern.reach is None
    with told.listening() as ran:
        if spans is not None and plain:
            out = _at_spans(spans, query, key, value, pattern, **options)
        else:
            out = _attend(query, key, value, pattern, **options)
    if session is not None:
        session.fire("attention", describe(session.rules), "attention interface", str(ran))
    out = out.transpose(1, 2).contiguous()
    if session is not None and session.see_attention is not None:
        session.see_attention(module, query, key, value, out)
    return out, _weights(query, key, pattern, **options) if shows else None


def _shows_weights(module: nn.Module, asked: Any) -> bool:
    """Whether somebody looks at the attention weights that the model's own implementation would give.

    Raises:
        UnsupportedModelError: they are asked for, and its own implementation has none.
    """
    own = getattr(getattr(module, "config", None), "_attn_implementation_internal", None) == "eager"
    if asked and not own:
        raise UnsupportedModelError(
            f"{running.frames[-1].name if running.frames else type(module).__name__}: attention was called with "
            'output_attentions, and its implementation has no weights: call model.set_attn_implementation("eager") '
            "first, and T x S weights are made beside the output"
        )
    return own and bool(asked or module._forward_hooks)


def _weights(query: torch.Tensor, key: torch.Tensor, pattern: KeyPattern, **options: Any) -> torch.Tensor:
    """Attention weights ``[B, HQ, T, S]``, which somebody asked for, with the same rule."""
    session = session_here()
    if session is not None:
        session.note("is asked for its attention weights: T x S of them are made beside the output")
    options["engine"] = "reference"
    identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
    with SITES.acting("attention"):
        return _attend(query, key, identity, pattern, **options)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern, **options: Any
) -> torch.Tensor:
    """Attention ``[B, HQ, T, D]`` under a pattern; documents one after the other, so that memory stays O(T)."""
    if pattern.documents is None:
        return _attend_one(query, key, value, pattern, **options)
    if len(pattern.documents) == 1:
        rows = [(slice(None), pattern.documents[0])]
    else:
        rows = [(slice(b, b + 1), starts) for b, starts in enumerate(pattern.documents)]
    done = []
    for row, starts in rows:
        parts = []
        for start, end in zip(starts, (*starts[1:], pattern.queries), strict=True):
            key_range = None
            if pattern.key_range is not None:
                key_range = (pattern.key_range[row] - start).clamp(0, end - start)
            inner = KeyPattern(end - start, end - start, pattern.causal, pattern.window, key_range, pattern.reach)
            q, k, v = (x[row, :, start:end] for x in (query, key, value))
            parts.append(_attend_one(q, k, v, inner, **options))
        done.append(torch.cat(parts, dim=2))
    return done[0] if len(done) == 1 else torch.cat(done)


def _attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern, **options: Any
) -> torch.Tensor:
    """Attention where each row is one document.

    Keys on both sides are seen through a causal window: with ``reach`` keys appended that do not exist, the last
    query's own key is ``reach`` before the last.
    """
    causal, window, key_range = pattern.causal, pattern.window, pattern.key_range
    if key_range is not None:
        key_range = key_range.to(query.device)  # the layers of one model may be on several devices
    if pattern.reach is not None and pattern.reach < pattern.keys - 1:
        if key_range is None:
            key_range = torch.tensor([[0, pattern.keys]], dtype=torch.int32, device=query.device)
            key_range = key_range.expand(query.shape[0], 2).contiguous()
        key, value = (nn.functional.pad(x, (0, 0, 0, pattern.reach)) for x in (key, value))
        causal, window = True, 2 * pattern.reach + 1
    head, width = query.shape[-1], value.shape[-1]
    if head != width:
        # Latent attention has keys and values of different sizes; zeros change neither the scores nor the sums.
        if options["scale"] is None:
            options["scale"] = head**-0.5
        query, key, value = (nn.functional.pad(x, (0, max(head, width) - x.shape[-1])) for x in (query, key, value))
    query, key = through_scores(query, key, options["softmax_backward"])
    out = gim_kernels.attention(query, key, value, causal=causal, window=window, key_range=key_range, **options)
    return out if head == width else out[..., :width]


def through_scores(query: torch.Tensor, key: torch.Tensor, softmax_backward: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key as the scores see them: without a gradient where the softmax is a constant.

    The kernels would give zeros, which would then be sent through rotations and projections for nothing.
    """
    return (query.detach(), key.detach()) if softmax_backward == "constant" else (query, key)


def _at_spans(
    spans: Spans, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern, **options: Any
) -> torch.Tensor:
    """Attention of the queries in ``spans`` only, 0 for all others; ``[B, HQ, T, D]``."""
    batch, heads, queries, _ = query.shape

    def nothing(tokens: int) -> torch.Tensor:
        return query.new_zeros(1).expand(batch, tokens, heads, value.shape[-1])

    pieces, done = [], 0
    for start, stop in spans.runs:
        # The causal mask is aligned at the last key, which must then be the last query's.
        end = stop if pattern.causal else pattern.keys
        key_range = None if pattern.key_range is None else pattern.key_range.clamp(max=end)
        inner = KeyPattern(stop - start, end, pattern.causal, pattern.window, key_range)
        part = _attend_one(query[:, :, start:stop], key[:, :, :end], value[:, :, :end], inner, **options)
        pieces += [nothing(start - done), part.transpose(1, 2)]
        done = stop
    out = torch.cat([*pieces, nothing(queries - done)], dim=1)
    if out.requires_grad:
        out.register_hook(spans.check)
    return out.transpose(1, 2)


def _matters(given: Any) -> bool:
    """Whether an unknown argument says anything: None, False and empty values do not."""
    return given is not None and given is not False and not (isinstance(given, dict | tuple | list) and not given)


#: Name under which an attention module holds the :class:`Spans` of queries that it need compute; absent for all.
SPANS = "_gim_spans"


@dataclass(frozen=True)
class Spans:
    """The queries that an attention module need compute.

    Args:
        runs: of neighbours, ``start:stop``, ascending.
        check: called with the gradient of the output ``[B, T, HQ, D]``, to refuse one that is not 0 elsewhere.
        session: whose forward passes need no others.
    """

    runs: tuple[tuple[int, int], ...]
    check: Callable[[torch.Tensor], None]
    session: Session


#: Name under which an attention module holds the rules that :func:`gim.set_attention_rules` gave it.
RULES = "_gim_attention_rules"


def describe(rules: Rules) -> str:
    """The rule of attention's backward, in words."""
    if not rules.modifies_attention:
        return "ordinary gradient"
    softmax = {
        "temperature": f"softmax at temperature {rules.temperature:g}",
        "constant": "softmax constant",
        "exact": "softmax exact",
    }[rules.softmax]
    return f"{softmax}; q, k, v times " + ", ".join(f"{factor:g}" for factor in rules.qkv_scale)


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
    rules = session.rules
    named: dict[str, Any] = {
        "softmax_backward": rules.softmax,
        "temperature": rules.temperature,
        "grad_scale": rules.qkv_scale,
        "engine": session.engine,
    }
    query, key = through_scores(query, key, rules.softmax)
    if mask is None:
        return gim_kernels.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, **named
        )
    lead = query.shape[:-2]
    if query.dim() == 3:
        query, key, value = query[:, None], key[:, None], value[:, None]
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"key must have query's {query.shape[1]} heads unless enable_gqa is True, got {key.shape[1]}")
    out = gim_kernels.attention(
        query,
        key,
        value,
        scale=scale,
        causal=mask.causal,
        window=mask.window,
        key_range=mask.key_range,
        **named,
    )
    return out.reshape(*lead, *out.shape[-2:])


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

    def plain() -> Any:
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if dropout_p != 0.0:
        session.refuse(f"{name} was called with dropout_p={dropout_p:g}: call model.eval() and pass 0")
        return plain()
    pattern = None
    if attn_mask is not None:
        if is_causal or query.dim() not in (3, 4):
            session.refuse(f"{name} was called with attn_mask and is_causal, or with queries of {query.dim()} dims")
            return plain()
        # A mask of fewer dimensions is broadcast from the right; three-dimensional queries have no heads.
        shape = (1,) * (query.dim() - attn_mask.dim()) + tuple(attn_mask.shape)
        wide = attn_mask.reshape(shape) if query.dim() == 4 else attn_mask.reshape(shape)[:, None]
        found = recognise(wide, query.shape[0], query.shape[-2], key.shape[-2])
        if isinstance(found, str):
            session.refuse(f"attn_mask of {name} {found}")
            return plain()
        pattern = found
    try:
        with told.listening() as ran:
            out = _dense(session, query, key, value, pattern, is_causal, scale, enable_gqa)
    except (TypeError, ValueError) as error:
        session.refuse(f"{name}: {error}", error)
        return plain()
    session.fire("attention", describe(session.rules), f"call of {name}", str(ran))
    return out


def _intersection(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The keys ``[B, 2]`` that are in both ranges; None is every key."""
    if first is None or second is None:
        return second if first is None else first
    start = torch.maximum(first[:, 0], second[:, 0])
    return torch.stack([start, torch.maximum(start, torch.minimum(first[:, 1], second[:, 1]))], -1)


def _multi_head_attention_forward(
    session: Session,
    func: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``nn.MultiheadAttention``, whose queries, keys and values exist once per head between projection and softmax.

    With ``need_weights`` the T x S weights that the caller asked for are computed beside the output, under the same
    rule; the output itself stays in O(T) memory.
    """

    plain = functools.partial(
        func,
        query,
        key,
        value,
        embed_dim_to_check,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout_p,
        out_proj_weight,
        out_proj_bias,
        training=training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        use_separate_proj_weight=use_separate_proj_weight,
        q_proj_weight=q_proj_weight,
        k_proj_weight=k_proj_weight,
        v_proj_weight=v_proj_weight,
        static_k=static_k,
        static_v=static_v,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    name = "nn.MultiheadAttention"
    appended = bias_k is not None or add_zero_attn
    if training and dropout_p > 0.0:
        reason = f"{name} has dropout {dropout_p:g} in training mode: call model.eval()"
    elif static_k is not None or static_v is not None:
        reason = f"{name} was called with static_k or static_v, which gim does not apply"
    elif appended and (attn_mask is not None or key_padding_mask is not None or is_causal):
        reason = f"{name} has bias_k or add_zero_attn together with a mask, which gim does not apply"
    elif query.is_nested or query.dim() not in (2, 3):
        reason = f"{name} was called with a nested query or one of {query.dim()} dimensions"
    elif is_causal and attn_mask is None:
        return plain()  # torch raises its own error
    else:
        reason = ""
    if reason:
        session.refuse(reason)
        return plain()

    batched = query.dim() == 3
    if not batched:
        query, key, value = (x[:, None] for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    queries, batch, width = query.shape
    if use_separate_proj_weight:
        weights: tuple[Any, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: tuple[Any, ...] = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))  # [T, B, E]
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, row.expand(1, batch, -1)]) for x, row in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (torch.cat([x, x.new_zeros(1, batch, x.shape[-1])]) for x in (k, v))
    keys = k.shape[0]
    q, k, v = (x.reshape(x.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))  # [B, H, T, D]

    causal_hint = is_causal and key_padding_mask is None and not need_weights  # torch then ignores the mask
    pattern = None
    if not causal_hint:
        for argument, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is None:
                continue
            # In this function True hides a key, the opposite of F.scaled_dot_product_attention.
            mask = ~mask if mask.dtype == torch.bool else mask
            if argument == "key_padding_mask":
                mask = mask[:, None, None]
            elif mask.dim() == 3:
                mask = mask.reshape(batch, num_heads, *mask.shape[1:])
            else:
                mask = mask[None, None]
            found = recognise(mask, batch, queries, keys)
            if isinstance(found, str):
                session.refuse(f"{argument} of {name} {found}")
                return plain()
            pattern = (
                found
                if pattern is None
                else dataclasses.replace(pattern, key_range=_intersection(pattern.key_range, found.key_range))
            )
    try:
        with told.listening() as ran:
            out = _dense(session, q, k, v, pattern, causal_hint, None, False)
    except (TypeError, ValueError) as error:
        session.refuse(f"{name}: {error}", error)
        return plain()
    rules, frame = session.rules, running.frames[-1]
    shown = None
    if need_weights:
        note = f"{frame.name or type(frame.module).__name__}: need_weights=True makes T x S weights beside the output"
        if note not in session.report.notes:
            session.report.notes.append(note)
        identity = torch.eye(keys, dtype=k.dtype, device=k.device).expand(batch, num_heads, keys, keys)
        with SITES.acting("attention"):
            shown = reference.attention(
                q,
                k,
                identity,
                causal=pattern is not None and pattern.causal,
                window=None if pattern is None else pattern.window,
                key_range=None if pattern is None else pattern.key_range,
                softmax_backward=rules.softmax,
                temperature=rules.temperature,
                grad_scale=rules.qkv_scale,
            )
        if average_attn_weights:
            shown = shown.mean(1)
        shown = shown if batched else shown[0]
    out = F.linear(out.permute(2, 0, 1, 3).reshape(queries, batch, width), out_proj_weight, out_proj_bias)
    session.fire("attention", describe(rules), f"call of {name}", str(ran))
    return out if batched else out[:, 0], shown


class _Softmax(torch.autograd.Function):
    """Weights, whose backward is ``P_T * (dP - rowsum(P_T * dP))`` with ``P_T = softmax(S / T)``, or nothing."""

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, weights: torch.Tensor, dim: int, temperature: float | None
    ) -> torch.Tensor:
        ctx.temperature, ctx.dim = temperature, dim
        if temperature is not None:
            ctx.save_for_backward(scores)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        if ctx.temperature is None:
            return None, None, None, None
        (scores,) = ctx.saved_tensors
        wide = torch.promote_types(scores.dtype, torch.float32)
        # A row that sees no key has no softmax, and passes no gradient on.
        softened = torch.softmax(scores.to(wide) / ctx.temperature, ctx.dim).nan_to_num(0.0)
        grad = grads[0].to(wide)
        grad_s = softened * (grad - (softened * grad).sum(ctx.dim, keepdim=True))
        return grad_s.to(scores.dtype), None, None, None


def _softmax(session: Session, func: Callable[..., Any], scores: torch.Tensor, *args: Any, **named: Any) -> Any:
    """A softmax over keys that the model writes out itself, in the O(T^2) memory of its own scores."""
    if not (scores.requires_grad and torch.is_grad_enabled() and origin(scores).scores):
        return func(scores, *args, **named)
    with SITES.acting("attention"):
        weights = func(scores, *args, **named)
    rules = session.rules
    dim = named.get("dim", args[0] if args else None)
    if not isinstance(dim, int) or "log" in func.__name__:
        session.refuse(f"calls {func.__name__} over its scores in a way that gim does not know how to apply")
        return weights
    if rules.softmax != "constant" and rules.q_scale != rules.k_scale:
        session.refuse("writes its softmax out, where only factors of q and k that are the same can be applied")
        return weights
    branch = scale_gradient(scores, rules.q_scale)
    if rules.softmax == "exact":
        with SITES.acting("attention"):
            weights = func(branch, *args, **named)
    else:
        temperature = None if rules.softmax == "constant" else rules.temperature
        # In the numbers of the softmax itself, which may be asked for wider than its scores.
        weights = _Softmax.apply(branch.to(weights.dtype), weights.detach(), dim, temperature)
    found = origin(weights)
    mark(weights, found._replace(weights=found.number, scores=False))
    session.expect_values(found.number)
    session.fire("attention", describe(rules), "softmax of its own scores", "torch")
    session.note(
        "writes its attention out: scores of T x S entries exist, as in the model's own code, and memory is O(T^2)"
    )
    return weights


def values(session: Session, run: Callable[..., Any], first: torch.Tensor, second: torch.Tensor) -> Any:
    """A matrix product; of attention weights with values, with the factor of the values' gradient."""
    if not torch.is_grad_enabled():
        return run(first, second)
    one, two = origin(first).weights, origin(second).weights
    if bool(one) != bool(two):
        return session.with_values(run, first, second, one, two)
    return run(first, second)


def _matmul(session: Session, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    if len(args) != 2 or not any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return func(*args, **named)
    return values(session, lambda a, b: func(a, b, **named), *args)


def _dropout(session: Session, func: Callable[..., Any], input: Any, p: float = 0.5, *args: Any, **named: Any) -> Any:
    """Dropout that acts makes attributions random."""
    training = named.get("training", args[0] if args else True)
    if p > 0 and training:
        session.refuse(
            f"drops out numbers (p={p:g}) by a call of {func.__name__}: call model.eval(), attributions are "
            "deterministic"
        )
    return func(input, p, *args, **named)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention_forward,
    **dict.fromkeys(
        (F.softmax, torch.softmax, torch.Tensor.softmax, F.log_softmax, torch.log_softmax, torch.Tensor.log_softmax),
        _softmax,
    ),
    **dict.fromkeys((torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys(
        (F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout, torch.dropout),
        _dropout,
    ),
}
