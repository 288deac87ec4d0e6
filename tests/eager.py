"""An independent implementation of decoder models and of every GIM rule, in eager PyTorch.

It shares no code with the packages: weights come from the Hugging Face model's parameters by name, the forward is
written out, and each rule is spelled as the equation of its backward. O(T^2) memory; any dtype. It is what
the packages are held against, and, in benchmarks, the correct eager rival.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class EagerRules:
    """The rules in the words of the paper."""

    temperature: float | None = 2.0  # None: exact; math.inf never used
    constant_softmax: bool = False
    freeze_norm: bool = True
    qkv: tuple[float, float, float] = (0.25, 0.25, 0.5)
    gate_up: tuple[float, float] = (0.5, 0.5)
    ratio: bool = False


#: The presets, written down again from the papers and not taken from the package.
PRESETS = {
    "GIM": EagerRules(),
    "GIM_CONSTANT": EagerRules(constant_softmax=True),
    "GRADIENT": EagerRules(None, False, False, (1, 1, 1), (1, 1)),
    "TRANSFORMER_LRP": EagerRules(None, True, True, (1, 1, 1), (1, 1)),
    "ATTNLRP": EagerRules(None, False, True, (0.25, 0.25, 0.5), (0.5, 0.5), True),
    "TSG_ONLY": EagerRules(2.0, False, False, (1, 1, 1), (1, 1)),
    "FREEZE_ONLY": EagerRules(None, False, True, (1, 1, 1), (1, 1)),
    "SCALES_ONLY": EagerRules(None, False, False, (0.25, 0.25, 0.5), (0.5, 0.5)),
}


class TemperatureSoftmax(torch.autograd.Function):
    """softmax(S), whose backward is P_T * (dP - rowsum(P_T * dP)) with P_T = softmax(S / T)."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.temperature = temperature
        ctx.save_for_backward(scores)
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        softened = torch.softmax(ctx.saved_tensors[0] / ctx.temperature, -1)
        centred = grads[0] - (softened * grads[0]).sum(-1, keepdim=True)
        return softened * centred, None


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, with its gradient times factor."""
    return x if factor == 1 else x * factor + (x * (1 - factor)).detach()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rules: EagerRules) -> torch.Tensor:
    rms = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x / (rms.detach() if rules.freeze_norm else rms) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


def softmax(scores: torch.Tensor, rules: EagerRules) -> torch.Tensor:
    """Attention weights over the last axis."""
    if rules.constant_softmax:
        return torch.softmax(scores, -1).detach()
    if rules.temperature is not None:
        return torch.as_tensor(TemperatureSoftmax.apply(scores, rules.temperature))
    return torch.softmax(scores, -1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, size: int, rules: EagerRules
) -> torch.Tensor:
    """[B, H, T, D] attention with whole score matrices; hidden [B, 1, T, T] is True where a key is not seen."""
    q, k, v = (scale(x, factor) for x, factor in zip((q, k, v), rules.qkv, strict=True))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return softmax((q @ k.mT / math.sqrt(size)).masked_fill(hidden, torch.finfo(q.dtype).min), rules) @ v


def forward(
    model: Any,
    embedded: torch.Tensor,
    rules: EagerRules,
    mask: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [B, T, V] of a Llama, Qwen2, Qwen3 or Mistral model from its embeddings [B, T, H].

    Args:
        model: the Hugging Face model; only its config and its parameters are used, in embedded's dtype.
        embedded: the input embeddings.
        rules: the rules.
        mask: padding [B, T], True where a token exists.
        kept: positions that go through the head; None for all.
    """
    config = model.config
    parameters = {name: p.detach().to(embedded.dtype) for name, p in model.named_parameters()}
    batch, length, _ = embedded.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    exists = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    positions = (exists.long().cumsum(-1) - 1).clamp_min(0)
    theta = config.rope_parameters["rope_theta"]
    # The models compute angles in float32 whatever their dtype; that belongs to the model, not to the method.
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.cat([positions[..., None].float() * frequency] * 2, -1)
    cos, sin = (f(angle).to(embedded.dtype)[:, None] for f in (torch.cos, torch.sin))
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ parameters[f"{name}.weight"].T
        bias = parameters.get(f"{name}.bias")
        return y if bias is None else y + bias

    x = embedded
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * (index + 1))[index]
        window = getattr(config, "sliding_window", None)
        if getattr(config, "layer_types", None) is not None and kind != "sliding_attention":
            window = None
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        hidden = hidden[None, None] | ~exists[:, None, None, :]
        n = rms_norm(x, parameters[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps, rules)
        q, k, v = (
            linear(n, f"{prefix}.self_attn.{one}_proj").view(batch, length, -1, size).transpose(1, 2) for one in "qkv"
        )
        if f"{prefix}.self_attn.q_norm.weight" in parameters:
            q = rms_norm(q, parameters[f"{prefix}.self_attn.q_norm.weight"], config.rms_norm_eps, rules)
            k = rms_norm(k, parameters[f"{prefix}.self_attn.k_norm.weight"], config.rms_norm_eps, rules)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        assert q.shape[1] == heads and k.shape[1] == kv_heads
        out = attend(q, k, v, hidden, size, rules)
        x = x + linear(out.transpose(1, 2).reshape(batch, length, heads * size), f"{prefix}.self_attn.o_proj")
        n = rms_norm(x, parameters[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps, rules)
        gate = scale(linear(n, f"{prefix}.mlp.gate_proj"), rules.gate_up[0])
        up = scale(linear(n, f"{prefix}.mlp.up_proj"), rules.gate_up[1])
        sigmoid = torch.sigmoid(gate)
        activated = gate * (sigmoid.detach() if rules.ratio else sigmoid)
        x = x + linear(activated * up, f"{prefix}.mlp.down_proj")
    x = rms_norm(x, parameters["model.norm.weight"], config.rms_norm_eps, rules)
    if kept is not None:
        x = x[:, kept]
    head = parameters.get("lm_head.weight", parameters["model.embed_tokens.weight"])
    return x @ head.T


def attribution(
    model: Any,
    ids: torch.Tensor,
    rules: EagerRules,
    *,
    baseline: int,
    target: int | None = None,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attributions [B, T] to the logit of ``target`` (None: the prediction) at each row's last token; the gradient."""
    table = model.get_input_embeddings().weight.detach().to(dtype)
    embedded = table[ids].requires_grad_(True)
    logits = forward(model, embedded, rules, mask)
    exists = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    last = torch.where(exists, torch.arange(ids.shape[1]), -1).amax(-1)
    rows = logits[torch.arange(ids.shape[0]), last]
    wanted = rows.argmax(-1) if target is None else torch.full((ids.shape[0],), target)
    (grad,) = torch.autograd.grad(rows[torch.arange(ids.shape[0]), wanted].sum(), embedded)
    scores = ((embedded.detach() - table[baseline]) * grad).sum(-1)
    return scores.masked_fill(~exists, 0.0), grad
