"""Attention of Hugging Face models, through their attention and mask interfaces.

``import gim`` registers the implementation ``"gim"`` in both. Outside a context it is ordinary attention in O(T)
memory; inside one, the module that calls it tells which rules to apply.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import gim_kernels
from gim.applied import Application, UnsupportedModelError
from gim.patches.key_patterns import KeyPattern, key_pattern, packed
from gim.patches.session import Session, original_forward, session_of
from gim.rules import GRADIENT, Rules
from gim.rules import get as get_rules
from gim_kernels import engines

#: Name of the implementation in both interfaces.
IMPLEMENTATION = "gim"

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
        cu_seq_lens_q, cu_seq_lens_k: ``[N + 1]``, where the packed documents of a batch of one start, and its length.
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
    if cu_seq_lens_q is not None:
        pattern = packed(name, pattern, cu_seq_lens_q, cu_seq_lens_k)
    rules = module.__dict__.get(_RULES, GRADIENT) if session is None else session.rules
    engine = engines.choose("auto", query)
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "softmax_backward": rules.softmax,
        "temperature": rules.temperature,
        "grad_scale": rules.qkv_scale,
        "engine": engine,
    }
    spans: Spans | None = module.__dict__.get(SPANS)
    plain = pattern.queries == pattern.keys and pattern.documents is None and pattern.reach is None
    if spans is not None and plain:
        out = _at_spans(spans, query, key, value, pattern, **options)
    else:
        out = _attend(query, key, value, pattern, **options)
    if session is not None:
        if not session.knows(name):
            session.add(_application(module, name, session.rules))
        session.count(name, engine)
    return out.transpose(1, 2).contiguous(), None


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


#: Name under which an attention module holds the rules that :func:`set_attention_rules` gave it.
_RULES = "_gim_attention_rules"


def set_attention_rules(model: PreTrainedModel, rules: Rules | str | None) -> None:
    """Give a model's attention rules of its own, outside any context: for code that does the rest itself.

    The model must use the implementation ``"gim"``, which ``import gim`` registers::

        model.set_attn_implementation("gim")
        gim.set_attention_rules(model, "GIM")

    What attention does of ``rules`` is then done in every forward pass: the softmax and the factors of q, k and v.
    Norms and gated MLPs are left to the caller; :func:`gim_kernels.rms_norm`, :func:`gim_kernels.layer_norm` and
    :func:`gim_kernels.gated` are theirs. Inside :class:`gim.GIM` the context's rules are in force.

    Args:
        model: a Hugging Face model.
        rules: :class:`gim.rules.Rules`, the name of a preset, or None to take them back.

    Raises:
        TypeError: model is not a Hugging Face model.
        ValueError: no preset has that name.
        UnsupportedModelError: the model's attention implementation is another.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    chosen = None if rules is None else get_rules(rules)
    if chosen is not None and model.config._attn_implementation != IMPLEMENTATION:
        raise UnsupportedModelError(
            f"{type(model).__name__} uses the attention implementation {model.config._attn_implementation!r}: call "
            'model.set_attn_implementation("gim") first'
        )
    for module in model.modules():
        if chosen is None:
            module.__dict__.pop(_RULES, None)
        else:
            module.__dict__[_RULES] = chosen


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


def patch(model: PreTrainedModel, session: Session, prefix: str = "") -> None:
    """Route every attention of a Hugging Face model through :func:`gim_attention` for the session's rules.

    ``prefix`` goes before the names of the modules of a model that is part of another.
    """
    expected = {f"{prefix}{name}": module for name, module in attention_modules(model).items()}
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
    callers = {name: module for name, module in expected.items() if _calls_torch(module)}
    if callers:
        for config in configs.values():
            config._attn_implementation_internal = IMPLEMENTATION
    else:
        model.set_attn_implementation(IMPLEMENTATION)
    stuck = [type(c).__name__ for c in configs.values() if c._attn_implementation != IMPLEMENTATION]
    for name, module in expected.items():
        if name not in callers and (stuck or not _calls_interface(module)):
            session.unsupported(
                name,
                f"({type(module).__name__}) does not go through the attention interface of transformers, so its "
                "softmax is out of reach",
            )
            continue
        session.set_attribute(module, _NAME, name)
        session.add(_application(module, name, session.rules))
        if name in callers:
            _route_torch(module, session)


def _application(module: nn.Module, name: str, rules: Rules) -> Application:
    return Application(
        part="attention",
        module=name,
        module_class=type(module).__name__,
        rule=describe(rules),
        recognised="calls F.scaled_dot_product_attention" if _calls_torch(module) else "attention interface",
    )


def _source(module: nn.Module) -> str:
    """The source of the file that defines a module's class; empty where there is none."""
    try:
        return inspect.getsource(sys.modules[type(module).__module__])
    except (OSError, TypeError, KeyError):
        return ""


def _calls_interface(module: nn.Module) -> bool:
    """Whether the file that defines a module uses the attention interface; True where there is no file to read.

    That the module itself does is seen in every forward pass: one that was expected to call and did not is an error.
    """
    source = _source(module)
    return not source or "ALL_ATTENTION_FUNCTIONS" in source or "AttentionInterface" in source


def _calls_torch(module: nn.Module) -> bool:
    """Whether a module attends through ``torch.nn.functional.scaled_dot_product_attention`` and no interface."""
    return not _calls_interface(module) and "scaled_dot_product_attention(" in _source(module)


class _TorchAttention(TorchFunctionMode):
    """Inside, torch's own attention function is :func:`gim_attention` for one module, on this thread."""

    def __init__(self, module: nn.Module, pattern: KeyPattern | None) -> None:
        super().__init__()
        self.module = module
        self.pattern = pattern

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        pattern: Any = self.pattern if attn_mask is None else attn_mask
        out, _ = gim_attention(
            self.module, query, key, value, pattern, scaling=scale, dropout=dropout_p, is_causal=is_causal
        )
        return out.transpose(1, 2)


def _route_torch(module: Any, session: Session) -> None:
    """Give a module that calls torch's attention function the pattern that its mask argument means.

    The module sees the config say "sdpa" and no mask, so that it takes the branch that calls torch.
    """
    original = original_forward(module)
    config = copy.copy(module.config)
    config._attn_implementation_internal = "sdpa"
    session.set_attribute(module, "config", config)

    def forward(*inputs: Any, **named: Any) -> Any:
        patterns = [one for one in (*inputs, *named.values()) if isinstance(one, KeyPattern)]
        inputs = tuple(None if isinstance(one, KeyPattern) else one for one in inputs)
        named = {key: None if isinstance(one, KeyPattern) else one for key, one in named.items()}
        with _TorchAttention(module, patterns[0] if patterns else None):
            return original(*inputs, **named)

    session.replace_forward(module, forward)


AttentionInterface.register(IMPLEMENTATION, gim_attention)
AttentionMaskInterface.register(IMPLEMENTATION, key_pattern)
