"""Attention by the kernels under a pattern of keys: the entry of transformers' attention interface.

``interface`` registers the implementation ``"gim"`` in transformers' attention and mask interfaces. Outside a context
it is ordinary attention in O(T) memory; inside one, the session that runs tells which rules to apply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import gim_kernels
from gim.applied import UnsupportedModelError
from gim.intercept.documents import attend_within
from gim.intercept.frames import Paused, running
from gim.intercept.masks import KeyPattern, packed, recognise
from gim.intercept.session import Session
from gim.intercept.sites import SITES
from gim.rules import GRADIENT, Rules
from gim_kernels import told
from gim_kernels.types import Engine

#: Keyword arguments of the attention interface that do not change what attention computes.
HARMLESS = frozenset({
    "cache_position", "deterministic", "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "position_embeddings", "position_ids", "return_dict", "target_dtype", "use_cache",
})  # fmt: skip


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
    frame = running.frames[-1] if running.frames else None
    session, name = (None, type(module).__name__) if frame is None else (frame.session, frame.name)
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
    with Paused():
        pattern = _pattern(name, module, query, key, attention_mask, is_causal, sliding_window)
        if cu_seq_lens_q is not None:
            pattern = packed(name, pattern, cu_seq_lens_q, cu_seq_lens_k)
        rules = module.__dict__.get(RULES, GRADIENT) if session is None else session.rules
        options = options_of(rules, "auto" if session is None else session.engine)
        options |= {"scale": scaling, "softcap": softcap, "sinks": s_aux}
        spans: Spans | None = module.__dict__.get(SPANS)
        plain = pattern.queries == pattern.keys and pattern.documents is None and pattern.reach is None
        with told.listening() as ran:
            if plain and spans is not None and spans.session is session:
                out = _at_spans(spans, query, key, value, pattern, **options)
            else:
                out = attend(query, key, value, pattern, **options)
        if session is not None:
            out = session.heads(out)
            session.fire("attention", "attention interface", str(ran))
        out = out.transpose(1, 2).contiguous()
        if session is not None and session.see_attention is not None:
            session.see_attention(module, query, key, value, out)
        if not shows:
            return out, None
        if session is not None:
            session.note("is asked for its attention weights: T x S of them are made beside the output")
        return out, weights_of(query, key, pattern, **options)


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
        queries, keys = query.shape[2], key.shape[2]
        # A mask that was left out before the forward, for an empty static cache: torch's function then aligns top-left.
        unseen = keys - queries if causal and 1 < queries < keys and _own_implementation(module) == "sdpa" else 0
        pattern = KeyPattern(queries, keys - unseen, causal, sliding_window, None, unseen=unseen)
    else:
        # Made before the forward, as generation with a static cache does; it may be of more keys than there are.
        mask = attention_mask[..., : key.shape[2]]
        if mask.dtype.is_floating_point:  # where a token of padding sees no key, it weighs all alike: nobody reads that
            mask = mask.masked_fill(mask == torch.finfo(mask.dtype).min, -torch.inf)
        found = recognise(mask, query.shape[0], query.shape[2], key.shape[2])
        if isinstance(found, str):
            raise UnsupportedModelError(f"{name}: attention was given a dense mask that {found}")
        return found
    keys = pattern.keys + pattern.unseen
    if (query.shape[2], key.shape[2]) != (pattern.queries, keys):
        raise UnsupportedModelError(
            f"{name}: the mask is for {pattern.queries} queries and {keys} keys, attention was called "
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


def _own_implementation(module: nn.Module) -> str | None:
    """The attention implementation that a module of transformers has outside a context."""
    return getattr(getattr(module, "config", None), "_attn_implementation_internal", None)


def _shows_weights(module: nn.Module, asked: Any) -> bool:
    """Whether somebody looks at the attention weights that the model's own implementation would give.

    Raises:
        UnsupportedModelError: they are asked for, and its own implementation has none.
    """
    own = _own_implementation(module) == "eager"
    if asked and not own:
        raise UnsupportedModelError(
            f"{running.frames[-1].name if running.frames else type(module).__name__}: attention was called with "
            'output_attentions, and its implementation has no weights: call model.set_attn_implementation("eager") '
            "first, and T x S weights are made beside the output"
        )
    return own and bool(asked or module._forward_hooks)


def options_of(rules: Rules, engine: Engine) -> dict[str, Any]:
    """What the operator is called with for the rules of attention, by an engine."""
    return {
        "softmax_backward": rules.softmax,
        "temperature": rules.temperature,
        "grad_scale": rules.qkv_scale,
        "engine": engine,
    }


def weights_of(query: torch.Tensor, key: torch.Tensor, pattern: KeyPattern, **options: Any) -> torch.Tensor:
    """Attention weights ``[B, HQ, T, S]``, which somebody asked for, with the same rule."""
    options["engine"] = "reference"
    identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1, -1)
    with SITES.acting("attention"):
        return attend(query, key, identity, pattern, **options)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern, **options: Any
) -> torch.Tensor:
    """Attention ``[B, HQ, T, D]`` under a pattern, in O(T) memory."""
    if pattern.unseen:
        key, value = key[:, :, : pattern.keys], value[:, :, : pattern.keys]
    if pattern.documents is None:
        return _attend_one(query, key, value, pattern, **options)

    def attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern) -> torch.Tensor:
        return _attend_one(query, key, value, pattern, **options)

    if len(pattern.documents) == 1:
        return attend_within(query, key, value, pattern, pattern.documents[0], attend_one)
    done = []
    for b, starts in enumerate(pattern.documents):
        row = slice(b, b + 1)
        own = None if pattern.key_range is None else pattern.key_range[row]
        inner = dataclasses.replace(pattern, key_range=own, documents=None)
        done.append(attend_within(query[row], key[row], value[row], inner, starts, attend_one))
    return torch.cat(done)


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
    query, key = through_scores(query, key, options["softmax_backward"])
    return gim_kernels.attention(query, key, value, causal=causal, window=window, key_range=key_range, **options)


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
