"""Attention as torch's function is called: its shapes and masks, brought to those of :func:`gim_kernels.attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gim_kernels import engines
from gim_kernels.arguments import check_tensor, number
from gim_kernels.attention import SoftmaxBackward, attention
from gim_kernels.types import Engine


def with_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """What torch's attention is called with as :func:`attention` takes it, and the shape of torch's output.

    As in torch, dimensions before the last two are broadcast against one another. With ``enable_gqa`` the heads of keys
    and of values, which may be as many as they like, are shared by those of queries instead. Nothing is copied that
    :func:`attention` can share.

    Args:
        query, key, value: ``[..., T or S, D]``, of 2 dimensions or more; of the first of 3, each is a row of a batch.
        enable_gqa: allow fewer heads of keys and values; the first of 3 dimensions is then heads.

    Raises:
        ValueError: the shapes do not fit.
    """
    given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("QKV", (query, key, value), strict=True))
    count = max(x.dim() for x in (query, key, value))
    if min(x.dim() for x in (query, key, value)) < 2:
        raise ValueError(f"query, key and value must have 2 dimensions or more, got {given}")
    query, key, value = (_four(x, count, enable_gqa) for x in (query, key, value))
    heads, *shared = (x.shape[-3] for x in (query, key, value))
    if not enable_gqa:
        together = max(heads, *shared)
        for name, other in zip(("key", "value"), shared, strict=True):
            if any(one not in (1, together) for one in (heads, other)):
                raise ValueError(f"{name} must have query's {heads} heads unless enable_gqa is True, got {other}")
        heads = together
        query = query.expand(*query.shape[:-3], heads, -1, -1)
        if shared[0] != shared[1]:
            key, value = (x.expand(*x.shape[:-3], heads, -1, -1) for x in (key, value))
    elif shared[0] != shared[1]:
        if any(one == 0 or heads % one for one in shared):
            raise ValueError(f"query heads must be a multiple of key heads and of value heads, got {given}")
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    try:
        lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    except RuntimeError as error:
        raise ValueError(f"query, key and value must have batch sizes that are the same or 1, got {given}") from error
    query, key, value = (
        x if x.dim() == 4 and x.shape[:1] == lead else x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])
        for x in (query, key, value)
    )
    shape = (*lead, query.shape[2], value.shape[-1])
    if not _is_batch(count, enable_gqa):
        shape = (*lead, heads, *shape[-2:])
    return query, key, value, shape[-count:]


def _is_batch(count: int, enable_gqa: bool) -> bool:
    """Whether the third last of ``count`` dimensions is a batch, for want of another, and not heads."""
    return count < 4 and not enable_gqa


def _four(x: torch.Tensor, count: int, enable_gqa: bool) -> torch.Tensor:
    """A tensor that is broadcast to ``count`` dimensions, with heads as its third last, of 4 dimensions or more."""
    x = x[(None,) * (count - x.dim())]
    x = x.unsqueeze(-3) if _is_batch(count, enable_gqa) else x
    return x[(None,) * (4 - x.dim())]


def mask_with_heads(mask: torch.Tensor, shape: tuple[int, ...], enable_gqa: bool) -> torch.Tensor:
    """A mask of torch's attention, whose output has that shape, as ``[B or 1, H or 1, T or 1, S or 1]``.

    Raises:
        ValueError: it is not one that torch broadcasts.
    """
    if not 2 <= mask.dim() <= len(shape):
        raise ValueError(f"attn_mask must have 2 to {len(shape)} dimensions, got shape {tuple(mask.shape)}")
    wide = _four(mask, len(shape), enable_gqa)
    if wide.dim() == 4:
        return wide
    lead = wide.shape[:-3]
    if any(one not in (1, size) for one, size in zip(lead, shape, strict=False)):
        raise ValueError(f"attn_mask must fit the batch sizes {shape[:-3]}, got shape {tuple(mask.shape)}")
    if any(one != 1 for one in lead):
        wide = wide.expand(*shape[:-3], *wide.shape[-3:])
    return wide.reshape(-1, *wide.shape[-3:])


def _range_of_mask(attn_mask: torch.Tensor, batch: int, keys: int) -> torch.Tensor:
    """The key range ``[B, 2]`` that a boolean mask ``[B or 1, 1, 1, S]`` (True: visible) stands for."""
    if attn_mask.dtype != torch.bool:
        raise TypeError(
            f"attn_mask must be boolean (True: visible), got {attn_mask.dtype}: an additive mask cannot be "
            "applied in O(T) memory"
        )
    if attn_mask.dim() != 4 or attn_mask.shape[1:] != (1, 1, keys) or attn_mask.shape[0] not in (1, batch):
        raise ValueError(
            f"attn_mask must have shape [B, 1, 1, S] = [{batch}, 1, 1, {keys}], one bit for each key, got "
            f"{tuple(attn_mask.shape)}: a mask of its own for every query is O(T^2). Use is_causal=True, or "
            "gim_kernels.attention with window and key_range."
        )
    return engines.key_range_of(attn_mask[:, 0, 0].expand(batch, keys), "attn_mask")


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softmax_backward: SoftmaxBackward = "exact",
    temperature: float = 2.0,
    grad_scale: Sequence[float] = (1.0, 1.0, 1.0),
    engine: Engine = "auto",
) -> torch.Tensor:
    """:func:`attention` behind the signature of ``torch.nn.functional.scaled_dot_product_attention``.

    A front end that calls torch's function swaps one name and adds the rule. As in torch, ``is_causal`` is aligned
    top-left: query i sees keys up to i. What cannot be had in O(T) memory is refused, never approximated.

    Args:
        query: ``[..., HQ, T, D]``; leading dimensions are a batch. With three dimensions, ``[N, T, D]``; with two,
            ``[T, D]``.
        key: ``[..., HK, S, D]``; heads and leading dimensions that are 1 or missing are broadcast, here and in query
            and value.
        value: ``[..., HK, S, DV]``.
        attn_mask: None, or boolean ``[B, 1, 1, S]``, True for the keys that exist, without holes; leading dimensions as
            query has them.
        dropout_p: must be 0.
        is_causal: top-left causal mask; excludes ``attn_mask``.
        scale: factor on the scores; None is ``1 / sqrt(D)``.
        enable_gqa: allow fewer key heads than query heads.
        softmax_backward: as in :func:`attention`.
        temperature: as in :func:`attention`.
        grad_scale: as in :func:`attention`.
        engine: as in :func:`attention`.

    Returns:
        ``[..., HQ, T, DV]``.

    Raises:
        TypeError: as :func:`attention`; an additive mask.
        ValueError: as :func:`attention`; dropout, a mask for every query, a mask with holes, a mask together with
            ``is_causal``, different head counts without ``enable_gqa``.

    Source: torch's documentation of the function of the same name.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
    if number("dropout_p", dropout_p) != 0.0:
        raise ValueError(f"dropout_p must be 0: attributions are deterministic, got {dropout_p!r}")
    if attn_mask is not None and (not isinstance(attn_mask, torch.Tensor) or attn_mask.layout != torch.strided):
        raise TypeError(f"attn_mask must be a dense tensor or None, got {type(attn_mask).__name__}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None when is_causal is True, as in torch")
    query, key, value, shape = with_heads(query, key, value, enable_gqa)
    queries, keys = query.shape[2], key.shape[2]
    key_range = None
    if attn_mask is not None:
        key_range = _range_of_mask(mask_with_heads(attn_mask, shape, enable_gqa), query.shape[0], keys)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        return attention(
            q,
            k,
            v,
            scale=scale,
            causal=causal,
            key_range=key_range,
            softmax_backward=softmax_backward,
            temperature=temperature,
            grad_scale=grad_scale,
            engine=engine,
        )

    if not is_causal or queries == keys:
        out = attend(query, key, value, is_causal)
    elif queries < keys:  # top-left: keys past the last query are seen by nobody
        out = attend(query, key[:, :, :queries], value[:, :, :queries], True)
    else:  # queries past the last key see every key
        square = attend(query[:, :, :keys], key, value, True)
        out = torch.cat([square, attend(query[:, :, keys:], key, value, False)], dim=2)
    return out.reshape(shape)
