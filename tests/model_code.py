"""GIM on a model's own code: an implementation of the rules that is independent of the package, for any family.

The model of transformers runs its own forward. Its attention calls :func:`attend`, written here with whole score
matrices; statistics of norms are detached where its code computes them; and products of gated MLPs are replaced by
formulas, one row of :data:`PRODUCTS` for each layout. O(T^2) memory; meant for float64, which stays float64 even
where models compute in float32 (:class:`Wide`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.eager import EagerRules, TemperatureSoftmax, scale

_active = threading.local()


class Wide(TorchFunctionMode):
    """Inside, float64 tensors stay float64 where code asks for float32, as norms, routers and rotations do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype != args[1].dtype:
            # Rotations multiply frequencies, which stayed wide, by positions, which are integers made float32.
            args = tuple(x.double() for x in args)
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = (args[0], *(one for one in args[1:] if one is not torch.float32))
                if kwargs.get("dtype") is torch.float32:
                    del kwargs["dtype"]
                if len(args) == 1 and not kwargs:
                    return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    factor: float,
    rules: EagerRules,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, H, T, D]; ``hidden`` is True where a key is not seen. Rows that see nothing give 0."""
    query, key, value = (scale(x, one) for x, one in zip((query, key, value), rules.qkv, strict=True))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * factor
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -1e30)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    if rules.constant_softmax:
        weights = torch.softmax(scores, -1).detach()
    elif rules.temperature is not None:
        weights = TemperatureSoftmax.apply(scores, rules.temperature)
    else:
        weights = torch.softmax(scores, -1)
    if sinks is not None:
        weights = weights[..., :-1]
    if hidden is not None:
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return weights @ value


def _interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    hidden = None if attention_mask is None else attention_mask[..., : key.shape[2]] < 0
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query, key, value, hidden, factor, _active.rules, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("tests", _interface)
AttentionMaskInterface.register("tests", eager_mask)


class Rules(TorchFunctionMode):
    """Inside, statistics of norms are constants where the rules say so, and torch's own attention is :func:`attend`."""

    def __init__(self, rules: EagerRules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.rules.freeze_norm:
            if func is F.layer_norm:
                return self._layer_norm(*args, **kwargs)
            if func is torch.rsqrt or (func in (torch.pow, torch.Tensor.pow) and args[1] == -0.5):
                return func(*args, **kwargs).detach()
        return func(*args, **kwargs)

    def _attention(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False
    ) -> torch.Tensor:
        hidden = None if attn_mask is None else ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < 0
        if is_causal:
            hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)[None, None]
        return attend(query, key, value, hidden, query.shape[-1] ** -0.5, self.rules)

    @staticmethod
    def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt().detach()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


def activated(gate: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor], rules: EagerRules) -> Any:
    """activation(gate), its gradient times the gate's factor, and act(x) / x for act'(x) where the rules say so."""
    gate = scale(gate, rules.gate_up[0])
    if not rules.ratio:
        return activation(gate)
    near = torch.where(gate == 0, 1e-12, gate)  # the ratio's limit where an embedding of zeros gives a gate of 0
    return gate * (activation(near) / near).detach()


def separate(module: Any, x: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate = activated(module.gate_proj(x), module.act_fn, rules)
    return module.down_proj(gate * scale(module.up_proj(x), rules.gate_up[1]))


def fused(module: Any, x: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate, up = module.gate_up_proj(x).chunk(2, -1)
    return module.down_proj(activated(gate, module.activation_fn, rules) * scale(up, rules.gate_up[1]))


def fused_modernbert(module: Any, x: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate, up = module.Wi(x).chunk(2, -1)
    return module.Wo(activated(gate, module.act, rules) * scale(up, rules.gate_up[1]))


def experts(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate, up = gate_up.chunk(2, -1)
    return activated(gate, module.act_fn, rules) * scale(up, rules.gate_up[1])


def separate_activation_fn(module: Any, x: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate = activated(module.gate_proj(x), module.activation_fn, rules)
    return module.down_proj(gate * scale(module.up_proj(x), rules.gate_up[1]))


def experts_llama4(module: Any, x: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate, up = torch.bmm(x.view(module.num_experts, -1, x.shape[-1]), module.gate_up_proj).chunk(2, -1)
    product = activated(gate, module.act_fn, rules) * scale(up, rules.gate_up[1])
    return torch.bmm(product, module.down_proj).view(-1, x.shape[-1])


def experts_gpt_oss(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    rules = _active.rules
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    return activated(gate, lambda x: x * torch.sigmoid(module.alpha * x), rules) * scale(up + 1, rules.gate_up[1])


#: For each way a class may compute its product: the method to replace and the formula.
PRODUCTS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "separate": ("forward", separate),
    "fused": ("forward", fused),
    "fused_modernbert": ("forward", fused_modernbert),
    "experts": ("_apply_gate", experts),
    "separate_activation_fn": ("forward", separate_activation_fn),
    "experts_llama4": ("forward", experts_llama4),
    "experts_gpt_oss": ("_apply_gate", experts_gpt_oss),
}


@contextlib.contextmanager
def applied(model: Any, rules: EagerRules, products: dict[str, str]) -> Iterator[None]:
    """Inside, a model's own forward follows the rules.

    Args:
        model: of transformers.
        rules: of the backward.
        products: class name of each gated MLP and its row of :data:`PRODUCTS`.
    """
    config, before = model.config, model.config._attn_implementation
    with pytest.MonkeyPatch.context() as patch:
        for module in model.modules():
            row = products.get(type(module).__name__)
            if row is not None:
                name, formula = PRODUCTS[row]
                patch.setattr(module, name, formula.__get__(module))
        _active.rules = rules
        if model._can_set_attn_implementation():
            model.set_attn_implementation("tests")
        try:
            with Rules(rules), Wide():
                yield
        finally:
            config._attn_implementation_internal = before


def attribution(
    model: Any,
    ids: torch.Tensor,
    rules: EagerRules,
    products: dict[str, str],
    *,
    baseline: int,
    target: int | None = None,
    mask: torch.Tensor | None = None,
    position: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attributions [B, T] of a model's embeddings, and their gradient.

    Args:
        target: a token, or a class where the logits are [B, C]; None for each row's prediction.
        position: whose logits are explained; None for each row's last token.
    """
    exists = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    leaves: list[torch.Tensor] = []

    def leaf(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    arguments: dict[str, Any] = {}
    if mask is not None:
        arguments["attention_mask"] = mask
        arguments["position_ids"] = (exists.long().cumsum(-1) - 1).clamp_min(0)
    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        with applied(model, rules, products):
            logits = model(ids, **arguments).logits
            if logits.dim() == 3:
                last = torch.where(exists, torch.arange(ids.shape[1]), -1).amax(-1)
                where = last if position is None else torch.full_like(last, position)
                logits = logits[torch.arange(ids.shape[0]), where]
            wanted = logits.argmax(-1) if target is None else torch.full((ids.shape[0],), target)
            (grad,) = torch.autograd.grad(logits[torch.arange(ids.shape[0]), wanted].sum(), leaves[0])
    finally:
        handle.remove()
    with torch.no_grad():
        start = model.get_input_embeddings()(torch.tensor([[baseline]]))
    scores = ((leaves[0].detach() - start) * grad).sum(-1)
    return scores.masked_fill(~exists, 0.0), grad


def inside(
    model: Any, ids: torch.Tensor, rules: EagerRules, products: dict[str, str], *, layers: Any, target: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each layer reads ``[B, L, T]``, and each head of its attention puts out ``[B, L, H]``, times the gradient.

    Args:
        layers: of the decoder; their attention calls transformers' interface.
        target: whose number at each row's last token, or whose class, is explained.
    """
    streams: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []

    def watched(*args: Any, **named: Any) -> torch.Tensor:
        heads.append(own(*args, **named))
        return heads[-1]

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        streams.append(given[0] if given else named["hidden_states"])

    own = attend
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.detach().requires_grad_()))
    try:
        with pytest.MonkeyPatch.context() as patch, applied(model, rules, products):
            patch.setitem(globals(), "attend", watched)
            logits = model(ids).logits
            explained = (logits[:, -1] if logits.dim() == 3 else logits)[:, target].sum()
            grads = torch.autograd.grad(explained, [*streams, *heads])
    finally:
        for handle in handles:
            handle.remove()
    seen = [x.detach() * grad for x, grad in zip([*streams, *heads], grads, strict=True)]
    cut = len(streams)
    return torch.stack([x.sum(-1) for x in seen[:cut]], 1), torch.stack([x.sum((-1, -2)) for x in seen[cut:]], 1)
