"""Models outside transformers: the rules at torch's own functions.

Each module of the model gets a ``forward`` on its instance that says which module runs; while the outermost of them
runs, a torch function mode is on in that thread. Attention, norms and gated products that a module of the model
computes by the functions below then follow the rules, and no function of torch is replaced. Calls made outside the
model's modules, by another model, a loss or a metric, pass by untouched, and so does every softmax.

Seen: ``F.scaled_dot_product_attention``, ``nn.MultiheadAttention`` and ``F.multi_head_attention_forward``;
``nn.LayerNorm``, ``nn.RMSNorm``, ``F.layer_norm`` and ``F.rms_norm``; a product of ``F.silu(gate)`` or ``F.gelu(gate)``
with another branch of the gate's shape. What a model writes out in elementary operations cannot be seen: see
:func:`patch` for what is an error then.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction
from transformers import PreTrainedModel

import gim_kernels
from gim.applied import ABSENT, UNSEEN, Application, Part, UnsupportedModelError
from gim.intercept.sites import SITES
from gim.patches import attention, dense_masks, gated_mlps, norms
from gim.patches.products import PRODUCTS
from gim.patches.session import Session, original_forward
from gim_kernels import engines, reference
from gim_kernels.gated import Activation

#: Attribute of a ``forward`` made here that holds the one it runs.
_INNER = "_gim_inner_forward"

#: Stands until a forward pass has been seen.
_LATER = "attention, and norms and gates that are calls of functions, are found when the model runs"


@dataclass(frozen=True)
class Frame:
    """A module that runs: its session, its name, its class, whether the rules act on its own calls.

    ``records_gradients`` and ``saving`` are the state of autograd where it began: the second is what packs saved
    tensors, None for torch itself.
    """

    session: Session
    name: str
    module_class: str
    active: bool
    records_gradients: bool
    saving: Any


class _Running(threading.local):
    """The modules that run in this thread, the outermost first."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []


_running = _Running()


@dataclass
class Expected:
    """A module whose part of the model must be seen to act once it runs."""

    part: Part
    reason: str


@dataclass
class _Activated:
    """An activation's output, held weakly, and the gate it was computed from."""

    output: Any
    gate: torch.Tensor
    activation: Activation


@dataclass
class State:
    """What one session knows of the calls inside its model."""

    rows: dict[tuple[str, str], Application] = field(default_factory=dict)
    expected: dict[str, Expected] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    fired: set[tuple[str, Part]] = field(default_factory=set)
    activated: dict[int, _Activated] = field(default_factory=dict)


def _saving() -> Any:
    """What packs the tensors that autograd saves now: a checkpoint, another hook, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def _in_function_checkpoint(frame: Frame) -> bool:
    """Whether a module's own code is inside a checkpoint that began there, around a function and no module."""
    saving = _saving()
    return (
        saving is not None and saving is not frame.saving and "_checkpoint_hook" in getattr(saving, "__qualname__", "")
    )


def _recomputing() -> bool:
    """Whether a backward runs in this thread, so that a forward in it is a checkpoint's second run."""
    return bool(torch._C._current_graph_task_id() != -1)


def count(row: Application, session: Session, state: State, engine: str) -> None:
    """Count a call, for its row and for every module that runs around it; a checkpoint's second run is the same."""
    state.fired.update((frame.name, row.part) for frame in _running.frames if frame.session is session)
    if _recomputing():
        return
    row.calls += 1
    row.engine = engine
    session.report.found(row.part)


class Calls(TorchFunctionMode):
    """Sends the calls that a model's modules make to the functions of :data:`HANDLERS`."""

    def __init__(self, session: Session, state: State, handlers: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.session = session
        self.state = state
        self.handlers = handlers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = self.handlers.get(func)
        named = kwargs or {}
        if handler is None or not _running.frames:
            return func(*args, **named)
        frame = _running.frames[-1]
        if frame.session is not self.session or not frame.active:
            return func(*args, **named)
        if func not in _UNTOUCHED_IN_CHECKPOINTS and _in_function_checkpoint(frame):
            self.refuse(
                frame,
                f"calls {func.__name__} in a checkpoint around a function, whose second run would follow no rule: "
                "put the checkpoint around a module",
            )
            return func(*args, **named)
        return handler(self, frame, func, *args, **named)

    def fire(self, frame: Frame, part: Part, function: str, rule: str, engine: str, module: str | None = None) -> None:
        """Enter a call in the report; ``module`` is the name of its row where that is not the frame's."""
        name = frame.name if module is None else module
        row = self.state.rows.get((name, function))
        if row is None:
            row = Application(part, name, frame.module_class, rule, f"call of {function}")
            self.state.rows[name, function] = row
            self.session.report.applications.append(row)
        count(row, self.session, self.state, engine)

    def refuse(self, frame: Frame, reason: str, because: Exception | None = None) -> None:
        """Raise where the session is strict, else report.

        Raises:
            UnsupportedModelError: the session is strict.
        """
        name = frame.name or frame.module_class
        if self.session.strict:
            raise UnsupportedModelError(f"{name}: {reason}") from because
        if (name, reason) not in self.session.report.unsupported:
            self.session.unsupported(name, reason)


def _attend(
    calls: Calls,
    frame: Frame,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: dense_masks.DensePattern | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention with the rules of the session; ``is_causal`` is aligned top-left, as in torch."""
    rules = calls.session.rules
    named: dict[str, Any] = {
        "softmax_backward": rules.softmax,
        "temperature": rules.temperature,
        "grad_scale": rules.qkv_scale,
    }
    query, key = attention.through_scores(query, key, rules.softmax)
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
    calls: Calls,
    frame: Frame,
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

    def plain() -> Any:
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    if dropout_p != 0.0:
        calls.refuse(frame, f"{name} was called with dropout_p={dropout_p:g}: call model.eval() and pass 0")
        return plain()
    pattern = None
    if attn_mask is not None:
        if is_causal or query.dim() not in (3, 4):
            calls.refuse(
                frame, f"{name} was called with attn_mask and is_causal, or with queries of {query.dim()} dims"
            )
            return plain()
        # A mask of fewer dimensions is broadcast from the right; three-dimensional queries have no heads.
        shape = (1,) * (query.dim() - attn_mask.dim()) + tuple(attn_mask.shape)
        wide = attn_mask.reshape(shape) if query.dim() == 4 else attn_mask.reshape(shape)[:, None]
        found = dense_masks.recognise(wide, query.shape[0], query.shape[-2], key.shape[-2])
        if isinstance(found, str):
            calls.refuse(frame, f"attn_mask of {name} {found}")
            return plain()
        pattern = found
    try:
        out = _attend(calls, frame, query, key, value, pattern, is_causal, scale, enable_gqa)
    except (TypeError, ValueError) as error:
        calls.refuse(frame, f"{name}: {error}", error)
        return plain()
    calls.fire(frame, "attention", name, attention.describe(calls.session.rules), engines.choose("auto", query))
    return out


def _intersection(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The keys ``[B, 2]`` that are in both ranges; None is every key."""
    if first is None or second is None:
        return second if first is None else first
    start = torch.maximum(first[:, 0], second[:, 0])
    return torch.stack([start, torch.maximum(start, torch.minimum(first[:, 1], second[:, 1]))], -1)


def _multi_head_attention_forward(
    calls: Calls,
    frame: Frame,
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
        calls.refuse(frame, reason)
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
            found = dense_masks.recognise(mask, batch, queries, keys)
            if isinstance(found, str):
                calls.refuse(frame, f"{argument} of {name} {found}")
                return plain()
            pattern = (
                found
                if pattern is None
                else dense_masks.DensePattern(
                    pattern.causal, pattern.window, _intersection(pattern.key_range, found.key_range)
                )
            )
    try:
        out = _attend(calls, frame, q, k, v, pattern, causal_hint, None, False)
    except (TypeError, ValueError) as error:
        calls.refuse(frame, f"{name}: {error}", error)
        return plain()
    rules = calls.session.rules
    shown = None
    if need_weights:
        note = f"{frame.name or frame.module_class}: need_weights=True makes T x S weights beside the output"
        if note not in calls.session.report.notes:
            calls.session.report.notes.append(note)
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
    calls.fire(frame, "attention", name, attention.describe(rules), engines.choose("auto", q))
    return out if batched else out[:, 0], shown


def _layer_norm(
    calls: Calls,
    frame: Frame,
    func: Callable[..., Any],
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *unused: Any,
    **ignored: Any,
) -> torch.Tensor:
    """``unused`` is ``torch.layer_norm``'s ``cudnn_enable``, which changes nothing."""
    name = "F.layer_norm"

    def apply(x: torch.Tensor, w: torch.Tensor | None, frozen: bool) -> torch.Tensor:
        return gim_kernels.layer_norm(x, w, None if bias is None else bias.flatten(), eps, frozen=frozen)

    return _norm(calls, frame, name, func, apply, input, normalized_shape, weight, (bias, eps))


def _rms_norm(
    calls: Calls,
    frame: Frame,
    func: Callable[..., Any],
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    name = "F.rms_norm"
    number = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps

    def apply(x: torch.Tensor, w: torch.Tensor | None, frozen: bool) -> torch.Tensor:
        return gim_kernels.rms_norm(x, w, number, frozen=frozen)

    return _norm(calls, frame, name, func, apply, input, normalized_shape, weight, (eps,))


def _norm(
    calls: Calls,
    frame: Frame,
    name: str,
    func: Callable[..., Any],
    apply: Callable[[torch.Tensor, torch.Tensor | None, bool], torch.Tensor],
    x: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None,
    rest: tuple[Any, ...],
) -> torch.Tensor:
    """A norm over the last dimensions, taken as one."""
    frozen = calls.session.rules.freeze_norm
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        return func(x, normalized_shape, weight, *rest)  # torch raises its own error
    try:
        flat = x.flatten(-len(shape)) if len(shape) > 1 else x
        y = apply(flat, None if weight is None else weight.flatten(), frozen).reshape(x.shape)
    except (TypeError, ValueError) as error:
        calls.refuse(frame, f"{name}: {error}", error)
        return func(x, normalized_shape, weight, *rest)
    rule = "statistic constant" if frozen else "ordinary gradient"
    calls.fire(frame, "norm", name, rule, engines.choose("auto", x))
    return y


def _other_norm(calls: Calls, frame: Frame, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """A norm whose statistic the kernels cannot freeze."""
    if calls.session.rules.freeze_norm:
        calls.refuse(
            frame,
            f"calls {func.__name__}, whose statistic cannot be frozen: pass freeze_norm=False, or use a norm over the "
            "last dimension",
        )
    return func(*args, **named)


def _batch_norm(
    calls: Calls,
    frame: Frame,
    func: Callable[..., Any],
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Outside training the statistics of a batch norm are constants already."""
    if training:
        return _other_norm(calls, frame, func, input, running_mean, running_var, weight, bias, training, momentum, eps)
    calls.fire(frame, "norm", "F.batch_norm", "statistic constant", "torch")
    return func(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _activation(
    calls: Calls, frame: Frame, func: Callable[..., Any], input: torch.Tensor, *args: Any, **named: Any
) -> Any:
    """Remember what an activation was computed from, for the product it may become a branch of."""
    gate = input
    inplace = bool(named.get("inplace", args[0] if args and isinstance(args[0], bool) else False))
    if inplace and torch.is_grad_enabled() and input.requires_grad:
        # The gate itself is overwritten, so a copy of it is what the backward needs.
        named, args = {**named, "inplace": False}, ()
    output = func(input, *args, **named)
    if not torch.is_grad_enabled() or not output.requires_grad:
        return output
    known: Activation = "silu"
    if func in _GELUS:
        approximate = named.get("approximate", args[0] if args else "none")
        known = "gelu_tanh" if approximate == "tanh" else "gelu"
    number, activated = id(output), calls.state.activated
    held = weakref.ref(output, lambda _: activated.pop(number, None))
    activated[number] = _Activated(held, gate, known)
    return output


def _product(calls: Calls, frame: Frame, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``activation(gate) * up``, where the two have one shape and both depend on the input."""
    if len(args) != 2 or named or not all(isinstance(x, torch.Tensor) for x in args):
        return func(*args, **named)
    found = [calls.state.activated.get(id(x)) for x in args]
    found = [one if one is not None and one.output() is x else None for one, x in zip(found, args, strict=True)]
    if found[0] is None and found[1] is None:
        return func(*args)
    one, up = (found[0], args[1]) if found[0] is not None else (found[1], args[0])
    assert one is not None
    if not up.requires_grad or up.shape != one.gate.shape or up is one.gate or up is one.output():
        return func(*args)  # a mask, a factor, or the gate itself: no second branch
    name = f"F.{one.activation.removesuffix('_tanh')}(gate) * up"
    rules = calls.session.rules
    both = found[0] is not None and found[1] is not None
    if both or up.dtype != one.gate.dtype or func in _IN_PLACE or _in_function_checkpoint(frame):
        if rules.modifies_gated_mlps:
            calls.refuse(
                frame,
                f"computes {name} with two activations, branches of two dtypes, in place or in a checkpoint around a "
                "function, which gim does not apply",
            )
        return func(*args)
    y = gim_kernels.gated(
        one.gate, up, one.activation, grad_scale=rules.gate_up_scale, activation_backward=rules.activation
    )
    calls.fire(frame, "gated_mlp", name, gated_mlps.describe(rules), engines.choose("auto", up))
    return y


def _other_gate(calls: Calls, frame: Frame, func: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """A gate whose activation the kernels do not have."""
    if calls.session.rules.modifies_gated_mlps:
        calls.refuse(
            frame, f"calls {func.__name__}, a gate that gim does not know: pass gate_scale=None and up_scale=None"
        )
    return func(*args, **named)


_GELUS = frozenset({F.gelu})
_IN_PLACE = frozenset({torch.Tensor.mul_, torch.Tensor.multiply_, torch.Tensor.__imul__})
#: Activations and products, which are watched for gates and most often are none.
_UNTOUCHED_IN_CHECKPOINTS = PRODUCTS | _IN_PLACE | {F.silu, F.gelu}

#: What is done with each function of torch that a module of the model calls.
HANDLERS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention_forward,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.group_norm: _other_norm,
    torch.group_norm: _other_norm,
    F.instance_norm: _other_norm,
    F.local_response_norm: _other_norm,
    torch.native_layer_norm: _other_norm,
    F.silu: _activation,
    F.gelu: _activation,
    F.glu: _other_gate,
    **dict.fromkeys(PRODUCTS | _IN_PLACE, _product),
}


@contextmanager
def _entered(frame: Frame) -> Iterator[None]:
    _running.frames.append(frame)
    try:
        yield
    finally:
        _running.frames.pop()


def _in_reentrant_checkpoint(session: Session) -> bool:
    """Whether this forward is the first run of a reentrant checkpoint around a module of the session's model."""
    outer = next((frame for frame in reversed(_running.frames) if frame.session is session), None)
    if outer is None or not outer.records_gradients or torch.is_grad_enabled():
        return False
    running: FrameType | None = sys._getframe()
    while running is not None and running.f_code is not CheckpointFunction.forward.__code__:
        running = running.f_back
    return running is not None


def _patched_forward(
    module: nn.Module, name: str, inner: Callable[..., Any], calls: Calls, active: bool
) -> Callable[..., Any]:
    """``inner``, which says that it runs, with the mode on where it is the outermost of its session."""
    session, module_class = calls.session, type(module).__name__

    @functools.wraps(inner)
    def forward(*inputs: Any, **named: Any) -> Any:
        running = any(frame.session is session for frame in _running.frames)
        frame = Frame(session, name, module_class, active, torch.is_grad_enabled(), _saving())
        if running and _in_reentrant_checkpoint(session):
            calls.refuse(
                frame,
                "runs in a reentrant checkpoint, whose second run after the context has closed would follow no rule: "
                "pass use_reentrant=False",
            )
        calls.state.ran.add(name)
        with _entered(frame):
            if running:
                return inner(*inputs, **named)
            with calls:
                return inner(*inputs, **named)

    setattr(forward, _INNER, inner)
    return forward


def _inner_forward(module: nn.Module, patched: bool) -> Callable[..., Any]:
    """What a module would run without the wrappers of this file; with ``patched``, with its other patch."""
    forward = module.forward
    while hasattr(forward, _INNER):
        forward = getattr(forward, _INNER)
    return forward if patched else original_forward(module)


def hugging_face_roots(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost Hugging Face models inside a model, by name."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{root}.") for root in found):
            found[name] = module
    return found


def patch(model: nn.Module, session: Session) -> None:
    """Send the calls of every module of a model through the rules, and have each forward pass looked at when it ends.

    Norms and gated MLPs that are modules of a known kind have been patched already; Hugging Face models inside the
    model are patched as such. At the end of each forward pass it is an error (``strict``; a line of the report else)

    - that nothing fired, or no attention although the rules change attention;
    - that a module which is attention by its class, or a norm or a gated MLP by what it holds, ran and no function
      that is seen fired inside it.

    That a model without a recognised gated MLP or norm may have one in a form that cannot be seen is written into the
    report's notes: most models without gates have none, and a gate in elementary operations looks like any product.
    A module of TorchScript, whose calls are not seen, is an error at once.
    """
    state = State()
    roots = hugging_face_roots(model)
    inside = tuple(f"{name}." for name in roots)
    for name, root in roots.items():
        attention.patch(root, session, prefix=f"{name}.")
    modules = {name: module for name, module in model.named_modules() if not name.startswith(inside) or not inside}
    own = {name: reason for name, reason in session.report.unsupported if name in modules and name not in roots}
    session.report.unsupported[:] = [pair for pair in session.report.unsupported if pair[0] not in own]
    for name, reason in own.items():
        part: Part = "norm" if norms.looks_like_norm(modules[name]) else "gated_mlp"
        state.expected[name] = Expected(part, reason)
    for name, module in attention.attention_modules(model).items():
        if name in modules:
            state.expected[name] = Expected(
                "attention",
                f"({type(module).__name__}) ran and called neither F.scaled_dot_product_attention nor "
                "nn.MultiheadAttention, so its softmax cannot be reached",
            )
    # Hugging Face models and gated MLPs with a patch of their own look after their own calls.
    passive = set(roots) | {application.module for application in session.report.of("gated_mlp")}
    known = {application.module for application in session.report.applications}
    watch(model, session, state, HANDLERS, modules=modules, patched=known, passive=passive)
    for part, note in ABSENT.items():
        if note in session.report.notes:
            session.report.notes[session.report.notes.index(note)] = UNSEEN[part]


def watch(
    model: nn.Module,
    session: Session,
    state: State,
    handlers: dict[Any, Callable[..., Any]],
    *,
    modules: dict[str, nn.Module],
    patched: set[str],
    passive: set[str],
) -> None:
    """Let each module say that it runs, and have each forward pass looked at when it ends.

    Args:
        modules: the modules to watch, by name.
        patched: those to which the session has given another ``forward``, which is kept.
        passive: those whose calls are not the rules' business.
    """
    calls = Calls(session, state, handlers)
    session.report.notes.append(_LATER)
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            session.unsupported(name, f"({type(module).__name__}) is TorchScript, whose calls cannot be seen")
            continue
        inner = _inner_forward(module, name in patched)
        session.replace_forward(module, _patched_forward(module, name, inner, calls, name not in passive))
    session.end_of_forward.append(lambda: _unfired(model, session, state))
    session.start_of_forward += [state.ran.clear, state.fired.clear]


def _unfired(model: nn.Module, session: Session, state: State) -> list[tuple[str, str]]:
    """What ran in a forward pass and should have fired."""
    rules, report = session.rules, session.report
    if _LATER in report.notes:
        report.notes.remove(_LATER)
    wanted: dict[Part, bool] = {
        "attention": rules.modifies_attention,
        "norm": rules.freeze_norm,
        "gated_mlp": rules.modifies_gated_mlps,
    }
    missing = [
        (name, expected.reason)
        for name, expected in state.expected.items()
        if wanted[expected.part] and name in state.ran and (name, expected.part) not in state.fired
    ]
    ran = {part: any(a.calls for a in report.of(part)) for part in wanted}
    name = type(model).__name__
    if any(wanted.values()) and not any(ran.values()):
        missing.append((name, "called no attention, norm or gated MLP that can be seen, so no rule acts on anything"))
    elif wanted["attention"] and not ran["attention"]:
        missing.append(
            (
                name,
                "called neither F.scaled_dot_product_attention nor nn.MultiheadAttention, so the rules of attention "
                "act on nothing; without attention in the model, pass softmax_temperature=None, q_scale=None, "
                "k_scale=None and v_scale=None",
            )
        )
    return missing
