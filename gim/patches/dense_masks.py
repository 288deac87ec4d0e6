"""What a dense attention mask says, where it can be said in O(T) memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gim_kernels.reference import visible

#: Added to a score in float32, less than this leaves a probability of exactly 0 beside any score a model has.
MASKED = -1e9


@dataclass(frozen=True)
class DensePattern:
    """A dense mask in the words of :func:`gim_kernels.attention`.

    Args:
        causal: aligned bottom-right: query i sees keys up to ``i + S - T``.
        window: query i sees keys ``j > i + S - T - window`` only; None for all.
        key_range: ``[B, 2]`` int32, first and one-past-last key of each row; None where every key exists.
    """

    causal: bool
    window: int | None = None
    key_range: torch.Tensor | None = None


def seen(mask: torch.Tensor) -> torch.Tensor | None:
    """Where a mask, boolean (True: seen) or added to the scores, lets a query see a key; None for a bias.

    An added mask is one only where every number is 0 or so low that no probability is left. Numbers that are finite
    weigh all keys alike in a row that sees none, which is no mask either.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point or mask.requires_grad:
        return None
    floor = max(MASKED, torch.finfo(mask.dtype).min)
    visible_keys = mask == 0
    if not bool((visible_keys | (mask <= floor)).all()):
        return None
    if bool((mask == -math.inf).logical_or(visible_keys).all()) or bool(visible_keys.any(-1).all()):
        return visible_keys
    return None


def recognise(mask: torch.Tensor, batch: int, queries: int, keys: int) -> DensePattern | str:
    """The pattern of a mask, or in words why it has none.

    A padding mask is read in O(T) memory. One that has a row for each query is as large as the scores already; it is
    compared with every pattern it could be, in booleans of its own size.

    Args:
        mask: ``[B or 1, H or 1, T or 1, S or 1]``, boolean (True: seen) or added to the scores.
        batch, queries, keys: B, T and S.
    """
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, queries):
        return f"has shape {tuple(mask.shape)}, which does not fit {batch} rows, {queries} queries and {keys} keys"
    if mask.shape[3] not in (1, keys):
        return f"has shape {tuple(mask.shape)}, which does not fit {keys} keys"
    keep = seen(mask)
    if keep is None:
        return "adds numbers of its own to the scores (a bias), which cannot be applied in O(T) memory"
    if keep.shape[1] > 1:
        if not bool((keep == keep[:, :1]).all()):
            return "differs from head to head"
        keep = keep[:, :1]
    keep = keep.expand(-1, -1, -1, keys)
    exists = keep.any(2)[:, 0]  # [B or 1, S]: the keys that any query sees
    key_range = None
    if not bool(exists.all()):
        first = exists.to(torch.int32).argmax(-1)
        end = torch.where(exists.any(-1), keys - exists.flip(-1).to(torch.int32).argmax(-1), 0)
        key_range = torch.stack([first, end], -1).to(torch.int32).expand(batch, 2).contiguous()
        if not bool((exists.sum(-1) == end - first).all()):
            return "hides keys between keys that it shows (packed or pruned sequences)"
    candidates = [DensePattern(False, None, key_range)]
    if queries > 1 and keep.shape[2] > 1:
        window = int(keep.sum(-1).max())  # the most keys that any query sees
        candidates += [DensePattern(True, None, key_range)]
        if 0 < window < keys:
            candidates += [DensePattern(True, window, key_range)]
    for pattern in candidates:
        want = visible(
            keep.shape[2],
            keys,
            causal=pattern.causal,
            window=pattern.window,
            key_range=None if pattern.key_range is None else pattern.key_range[: keep.shape[0]],
            device=keep.device,
        )
        if bool((keep == want).all()):
            return pattern
    return "is neither causal, windowed nor padding, and an arbitrary mask cannot be applied in O(T) memory"
