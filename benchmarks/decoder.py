"""The correct eager rival: a decoder with every GIM rule, in plain PyTorch, on any device.

It shares no code with the packages: weights come from the Hugging Face model by name, the forward is written out, and
the primitives are those of the tests' independent implementation. With whole score matrices it is what a paper's code
does; with a chunk of queries at a time, each recomputed in the backward, what a careful user would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.eager import PRESETS, EagerRules, TemperatureSoftmax, rotate, scale

#: Families that the forward below is written for, each with what it does besides Llama.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"norm_offset": 1.0, "post_norms": True, "gelu": True, "scaled_embedding": True},
}


def softmax(scores: torch.Tensor, rule: str, temperature: float) -> torch.Tensor:
    """Weights of scores ``[..., T, S]`` under one of the three softmax backwards."""
    if rule == "temperature":
        return TemperatureSoftmax.apply(scores, temperature)
    weights = torch.softmax(scores, -1)
    return weights.detach() if rule == "constant" else weights


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    rule: str,
    causal: bool,
    temperature: float = 2.0,
    factor: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Attention ``[B, HQ, T, D]`` with whole score matrices, or with ``chunk`` queries at a time.

    Args:
        q, k, v: ``[B, HQ, T, D]`` and ``[B, HK, T, D]``.
        rule, temperature: of the softmax's backward.
        causal, window, softcap: as in :func:`gim_kernels.attention`.
        factor: on the scores; None is ``1 / sqrt(D)``.
        chunk: queries whose scores exist at once, computed again in the backward; None for all, computed once.
    """
    length = q.shape[2]
    factor = 1.0 / math.sqrt(q.shape[-1]) if factor is None else factor
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))

    def rows(part: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        scores = part @ keys.mT * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query = torch.arange(start, start + part.shape[2], device=q.device)[:, None]
        key = torch.arange(keys.shape[2], device=q.device)[None, :]
        hidden = key > query if causal else torch.zeros_like(key > query)
        if window is not None:
            hidden = hidden | (key <= query - window)
        # Finite, so that no dtype overflows; exp of it is 0.
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        weights = softmax(scores.masked_fill(hidden, -1e30), rule, temperature)
        return weights.to(values.dtype) @ values

    if chunk is None:
        return rows(q, k, v, 0)
    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        seen = stop if causal else length
        parts.append(
            checkpoint(
                rows,
                q[:, :, start:stop],
                k[:, :, :seen],
                v[:, :, :seen],
                start,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(parts, 2)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, frozen: bool, offset: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    rms = (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    normal = wide / (rms.detach() if frozen else rms)
    return (normal * (weight.to(wide.dtype) + offset)).to(x.dtype)


def forward(model: Any, x: torch.Tensor, rules: EagerRules, chunk: int | None = None) -> torch.Tensor:
    """Logits ``[B, V]`` after the last token, from the embeddings ``[B, T, H]``, in their dtype.

    Raises:
        NotImplementedError: a family that this forward is not written for.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise NotImplementedError(f"the eager rival is not written for {config.model_type}")
    special = FAMILIES[config.model_type]
    offset = special.get("norm_offset", 0.0)
    weights = {name: p.detach().to(x.dtype) for name, p in model.named_parameters()}
    batch, length, _ = x.shape
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The models compute angles in float32 whatever their dtype; that belongs to the model, not to the method.
    theta = config.rope_parameters["rope_theta"]
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angle = torch.cat([torch.arange(length, device=x.device)[:, None].float() * frequency] * 2, -1)
    cos, sin = (f(angle).to(x.dtype) for f in (torch.cos, torch.sin))
    rule = "constant" if rules.constant_softmax else "exact" if rules.temperature is None else "temperature"

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return _norm(x, weights[f"{name}.weight"], config.rms_norm_eps, rules.freeze_norm, offset)

    def same(x: torch.Tensor, _: str) -> torch.Tensor:
        return x

    after: Callable[[torch.Tensor, str], torch.Tensor] = norm if special.get("post_norms") else same
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        kinds = getattr(config, "layer_types", None)
        is_windowed = kinds is not None and kinds[index] == "sliding_attention"
        n = norm(x, f"{prefix}.input_layernorm")
        q, k, v = (
            linear(n, f"{prefix}.self_attn.{one}_proj").view(batch, length, -1, size).transpose(1, 2) for one in "qkv"
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (scale(one, factor) for one, factor in zip((q, k, v), rules.qkv, strict=True))
        out = attend(
            q,
            k,
            v,
            rule=rule,
            causal=True,
            temperature=rules.temperature or 1.0,
            factor=getattr(config, "query_pre_attn_scalar", size) ** -0.5,
            window=config.sliding_window if is_windowed else None,
            softcap=getattr(config, "attn_logit_softcapping", None),
            chunk=chunk,
        )
        out = linear(out.transpose(1, 2).reshape(batch, length, -1), f"{prefix}.self_attn.o_proj")
        x = x + after(out, f"{prefix}.post_attention_layernorm")
        before_mlp = "pre_feedforward_layernorm" if special.get("post_norms") else "post_attention_layernorm"
        n = norm(x, f"{prefix}.{before_mlp}")
        gate = scale(linear(n, f"{prefix}.mlp.gate_proj"), rules.gate_up[0])
        up = scale(linear(n, f"{prefix}.mlp.up_proj"), rules.gate_up[1])
        activated = F.gelu(gate, approximate="tanh") if special.get("gelu") else F.silu(gate)
        x = x + after(linear(activated * up, f"{prefix}.mlp.down_proj"), f"{prefix}.post_feedforward_layernorm")
    last = norm(x[:, -1:], "model.norm")[:, 0]
    logits = last @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def attribution(
    model: Any,
    ids: torch.Tensor,
    rules: EagerRules | str,
    *,
    target: int,
    baseline: int,
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Attributions ``[T]`` of the ids ``[1, T]`` to the logit of ``target``; ``dtype`` None is the model's own.

    ``rules`` may be the name of a preset of the tests' independent implementation.
    """
    table = model.get_input_embeddings().weight.detach()
    dtype = dtype or table.dtype
    multiplier = 1.0
    if FAMILIES.get(model.config.model_type, {}).get("scaled_embedding"):
        # Hugging Face rounds the factor to the type of the weights.
        multiplier = torch.tensor(model.config.hidden_size**0.5).to(dtype).item()
    embedded = (table[ids].to(dtype) * multiplier).requires_grad_(True)
    logits = forward(model, embedded, PRESETS[rules] if isinstance(rules, str) else rules, chunk)
    (grad,) = torch.autograd.grad(logits[0, target], embedded)
    wide = torch.promote_types(dtype, torch.float32)
    difference = embedded.detach().to(wide) - table[baseline].to(wide) * multiplier
    return (difference * grad.to(wide)).sum(-1)[0]
