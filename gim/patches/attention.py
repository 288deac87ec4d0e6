"""Attention of Hugging Face models, through their attention and mask interfaces.

``import gim`` registers the implementation ``"gim"`` in both. Outside a context it is ordinary attention in O(T)
memory; inside one, the module that calls it tells which rules to apply.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import gim_kernels
from gim.applied import Application, UnsupportedModelError
from gim.patches.session import Session, session_of
from gim.rules import GRADIENT, Rules
from gim_kernels import engines

#: Name of the implementation in both interfaces.
IMPLEMENTATION = "gim"

#: Keyword arguments of the attention interface that do not change what attention computes.
HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "output_hidden_states",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "use_cache",
        "num_items_in_batch",
    }
)


@dataclass(frozen=True)
class KeyPattern:
    """Which keys the queries of a batch see: what the mask interface returns in place of a T x S tensor.

    Args:
        queries, keys: T and S.
        causal: query i sees keys up to ``i + S - T``.
        window: query i sees keys ``j > i + S - T - window`` only; None for all.
        key_range: ``[B, 2]`` int32, first and one-past-last key of each row; None where every key exists.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    key_range: torch.Tensor | None


def key_pattern(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> KeyPattern:
    """The entry of the mask interface: a mask function in, the pattern it describes out, in O(T) memory.

    The function is evaluated where a causal, windowed or bidirectional mask has its edges, for every query. A mask
    of another shape disagrees there with all three and is refused.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes, and positions of query 0 and key 0.
        mask_function: ``(batch, head, query, key) -> bool`` over index tensors.
        attention_mask: padding mask ``[B, S]``, True where the token exists, or None.
        local_size: the window that the model announces, or None.
        use_vmap: the model added a mask function of its own.
        device: where the model's inputs are.

    Raises:
        UnsupportedModelError: the mask is none of the patterns.
        ValueError: a padding mask with holes.
    """
    if use_vmap:
        raise UnsupportedModelError(
            "attention_mask: the model adds a mask function of its own (use_vmap), which cannot be applied in "
            "O(T) memory"
        )
    first_query = int(q_offset)
    if first_query + q_length != kv_offset + kv_length and q_length > 1:
        raise UnsupportedModelError(
            f"attention_mask: queries {first_query}..{first_query + q_length} do not end where keys "
            f"{kv_offset}..{kv_offset + kv_length} end (a static cache?): run with use_cache=False"
        )
    causal, window = _classify(
        mask_function, batch_size, q_length, kv_length, first_query, kv_offset, local_size, device
    )
    key_range = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise UnsupportedModelError(
                f"attention_mask: must be [B, S] with one entry for each token, got shape {tuple(attention_mask.shape)}"
            )
        exists = attention_mask[:, -kv_length:].to(torch.bool)
        if exists.shape[1] != kv_length or not bool(exists.all()):
            if exists.shape[1] < kv_length:
                raise UnsupportedModelError(f"attention_mask: has {exists.shape[1]} entries for {kv_length} keys")
            key_range = engines.key_range_of(exists, "attention_mask").to(device)
    return KeyPattern(q_length, kv_length, causal, window, key_range)


def _classify(
    mask_function: Callable[..., torch.Tensor] | None,
    batch: int,
    queries: int,
    keys: int,
    first_query: int,
    first_key: int,
    window: int | None,
    device: torch.device | str,
) -> tuple[bool, int | None]:
    """Whether a mask function is causal, and its window; an error where it is neither that nor bidirectional."""
    if mask_function is None:
        return True, window
    query = torch.arange(queries, device=device) + first_query
    row = torch.arange(batch, device=device)[:, None]
    last_key = first_key + keys - 1

    def sees(key: torch.Tensor) -> torch.Tensor:
        """Whether each query sees its ``key`` ``[T]``; outside the keys, nothing is asked."""
        inside = key.clamp(first_key, last_key)
        return torch.as_tensor(mask_function(row, 0, query, inside), device=device).expand(batch, queries)

    def agrees(key: torch.Tensor, visible: torch.Tensor) -> bool:
        asked = (key >= first_key) & (key <= last_key)
        return bool((~asked | (sees(key) == visible)).all())

    everything = torch.ones_like(query, dtype=torch.bool)
    ends = (torch.full_like(query, first_key), torch.full_like(query, last_key))
    if window is None and all(agrees(key, everything) for key in (*ends, query, query + 1)):
        # One key, or one query that sees all of them, is causal and bidirectional at once.
        return False, None
    edges = [(query, everything), (query + 1, ~everything)]
    if window is None:
        edges.append((ends[0], everything))
    else:
        edges += [(query - window + 1, everything), (query - window, ~everything)]
        edges.append((ends[0], ends[0] > query - window))
    if all(agrees(key, visible) for key, visible in edges):
        return True, window
    raise UnsupportedModelError(
        "attention_mask: the model's mask is neither causal, windowed nor bidirectional (packed sequences, "
        "chunks or blocks of another kind), and an arbitrary mask cannot be applied in O(T) memory"
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
    **others: Any,
) -> tuple[torch.Tensor, None]:
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
        others: arguments that change nothing; any other is refused.

    Returns:
        ``[B, T, HQ, D]`` and None in place of attention weights.

    Raises:
        UnsupportedModelError: something that cannot be applied exactly; names the module.
    """
    session = session_of(module)
    name = _name(module, session)
    asked = sorted(key for key, given in others.items() if key not in HARMLESS and _matters(given))
    if asked:
        raise UnsupportedModelError(
            f"{name}: attention was called with {', '.join(asked)}, which gim does not know how to apply"
        )
    if dropout != 0.0:
        raise UnsupportedModelError(
            f"{name}: attention dropout is {dropout:g}: call model.eval(), attributions are deterministic"
        )
    if isinstance(attention_mask, KeyPattern):
        pattern = attention_mask
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
        and sliding_window != window
        and min(pattern.keys, sliding_window) != (min(pattern.keys, window) if window is not None else pattern.keys)
    ):
        raise UnsupportedModelError(
            f"{name}: attention was called with a window of {sliding_window} and a mask with {window}"
        )
    rules = GRADIENT if session is None else session.rules
    engine = engines.choose("auto", query)

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_range: torch.Tensor | None
    ) -> torch.Tensor:
        return gim_kernels.attention(
            query,
            key,
            value,
            scale=scaling,
            causal=pattern.causal,
            window=window,
            softcap=softcap,
            sinks=s_aux,
            key_range=key_range,
            softmax_backward=rules.softmax,
            temperature=rules.temperature,
            grad_scale=rules.qkv_scale,
            engine=engine,
        )

    spans = module.__dict__.get(SPANS)
    if spans is None or pattern.queries != pattern.keys or (window is not None and not pattern.causal):
        out = attend(query, key, value, pattern.key_range)
    else:
        out = _at_spans(attend, spans, query, key, value, pattern)
    if session is not None:
        session.count(name, engine)
    return out.transpose(1, 2).contiguous(), None


def _at_spans(
    attend: Callable[..., torch.Tensor],
    spans: Spans,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: KeyPattern,
) -> torch.Tensor:
    """Attention of the queries in ``spans`` only, 0 for all others; ``[B, HQ, T, D]``."""
    batch, heads, queries, size = query.shape

    def nothing(tokens: int) -> torch.Tensor:
        return query.new_zeros(1).expand(batch, tokens, heads, size)

    pieces, done = [], 0
    for start, stop in spans.runs:
        # The causal mask is aligned at the last key, which must then be the last query's.
        end = stop if pattern.causal else pattern.keys
        key_range = None if pattern.key_range is None else pattern.key_range.clamp(max=end)
        part = attend(query[:, :, start:stop], key[:, :, :end], value[:, :, :end], key_range)
        pieces += [nothing(start - done), part.transpose(1, 2)]
        done = stop
    out = torch.cat([*pieces, nothing(queries - done)], dim=1)
    if out.requires_grad:
        out.register_hook(spans.check)
    return out.transpose(1, 2)


def _matters(given: Any) -> bool:
    """Whether an unknown argument says anything: None, False and empty values do not."""
    return given is not None and given is not False and not (isinstance(given, dict | tuple | list) and not given)


def _name(module: nn.Module, session: Session | None) -> str:
    """The module's qualified name where a session knows it, else its class."""
    if session is None:
        return type(module).__name__
    return str(module.__dict__.get(_NAME, type(module).__name__))


#: Name under which an attention module holds its own qualified name while a session is open.
_NAME = "_gim_name"
#: Name under which an attention module holds the :class:`Spans` of queries that it need compute; absent for all.
SPANS = "_gim_spans"


@dataclass(frozen=True)
class Spans:
    """The queries that an attention module need compute.

    Args:
        runs: of neighbours, ``start:stop``, ascending.
        check: called with the gradient of the output ``[B, T, HQ, D]``, to refuse one that is not 0 elsewhere.
    """

    runs: tuple[tuple[int, int], ...]
    check: Callable[[torch.Tensor], None]


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model: those named so that contain no other."""
    named = {name: module for name, module in model.named_modules() if "Attention" in type(module).__name__}
    return {
        name: module
        for name, module in named.items()
        if not any(other != name and other.startswith(f"{name}." if name else "") for other in named)
    }


def patched_modules(module: nn.Module) -> list[nn.Module]:
    """The attention modules inside ``module`` that go through :func:`gim_attention` in an open session."""
    return [inner for inner in module.modules() if _NAME in inner.__dict__]


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


class _Switches:
    """How many open sessions need each config to say ``"gim"``, and what it said before the first.

    Two models may share one config object; the first session to open switches it, the last to close puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, tuple[Any, str | None, int]] = {}

    def acquire(self, config: Any) -> None:
        with self._lock:
            _, before, users = self._open.get(id(config), (config, config._attn_implementation, 0))
            self._open[id(config)] = (config, before, users + 1)

    def release(self, config: Any) -> None:
        with self._lock:
            _, before, users = self._open.pop(id(config))
            if users > 1:
                self._open[id(config)] = (config, before, users - 1)
            else:
                config._attn_implementation_internal = before


_switches = _Switches()


def patch(model: nn.Module, session: Session) -> None:
    """Route every attention of a Hugging Face model through :func:`gim_attention` for the session's rules."""
    expected = attention_modules(model)
    if not isinstance(model, PreTrainedModel):
        session.unsupported(
            type(model).__name__,
            "is not a transformers PreTrainedModel, so its attention cannot be switched",
        )
        return
    if not expected:
        session.unsupported(type(model).__name__, "has no module whose class is named Attention")
        return
    configs: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs.setdefault(id(module.config), module.config)
    for config in configs.values():
        _switches.acquire(config)
        session.undo.callback(_switches.release, config)
    model.set_attn_implementation(IMPLEMENTATION)
    stuck = [type(c).__name__ for c in configs.values() if c._attn_implementation != IMPLEMENTATION]
    if stuck:
        for name in expected:
            session.unsupported(
                name,
                f"does not go through the attention interface of transformers ({type(model).__name__} cannot "
                "switch its attention implementation)",
            )
        return
    for name, module in expected.items():
        session.set_attribute(module, _NAME, name)
        session.add(
            Application(
                part="attention",
                module=name,
                module_class=type(module).__name__,
                rule=describe(session.rules),
                recognised="attention interface",
            )
        )


AttentionInterface.register(IMPLEMENTATION, gim_attention)
AttentionMaskInterface.register(IMPLEMENTATION, key_pattern)
