"""Which keys each query sees: one description, in O(T) memory, of what models say in functions or dense tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gim.applied import UnsupportedModelError
from gim_kernels import engines
from gim_kernels.reference import visible

#: Added to a score in float32, less than this leaves a probability of exactly 0 beside any score a model has.
MASKED = -1e9


@dataclass(frozen=True)
class KeyPattern:
    """Which keys the queries of a batch see, in place of a T x S tensor.

    Args:
        queries, keys: T and S.
        causal: query i sees keys up to ``i + S - T``.
        window: causal only: query i sees keys ``j > i + S - T - window`` only; None for all.
        key_range: ``[B, 2]`` int32, first and one-past-last key of each row; None where every key exists.
        reach: not causal only: query i sees keys j with ``|i + S - T - j| <= reach``; None for all.
        documents: for each row, where its documents start, 0 first; a query sees keys of its own document only.
            None where each row is one document. Rows that are alike share one entry.
        unseen: how many keys follow those S in what attention is called with, slots of a cache that no query sees.
        refused: why the mask cannot be applied; an error once attention is called with it, and empty where it can.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    key_range: torch.Tensor | None
    reach: int | None = None
    documents: tuple[tuple[int, ...], ...] | None = None
    refused: str = ""
    unseen: int = 0

    def __getattr__(self, name: str) -> Any:
        raise _used(name)

    def _entries(*_: Any, **__: Any) -> Any:
        raise _used("entries")

    # What a model that adds the mask to its scores itself would do with them, a tensor before it or none.
    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __invert__ = __neg__ = _entries
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = __truediv__ = __rtruediv__ = _entries
    __eq__ = __ne__ = _entries  # else False, whatever the mask says
    __torch_function__ = classmethod(_entries)


class _MaskUsedError(UnsupportedModelError, AttributeError):
    """A model treats the pattern as a tensor; an AttributeError too, so that ``hasattr`` works."""


def _used(name: str) -> _MaskUsedError:
    return _MaskUsedError(
        f"attention_mask: the model's own code asks the mask for its {name}, and there is no mask of T x S entries to "
        "give it: what it makes of the mask cannot be applied in O(T) memory"
    )


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
        reason = "is made with a function of the model's own (use_vmap), which cannot be applied in O(T) memory"
        return KeyPattern(q_length, kv_length, True, None, None, refused=reason)
    first_query = int(q_offset)
    pattern = _classify(mask_function, batch_size, q_length, kv_length, first_query, kv_offset, local_size, device)
    # Behind the last query's own key are slots of a cache that nothing has been put into.
    unseen = kv_offset + kv_length - first_query - q_length if pattern.causal or pattern.reach is not None else 0
    if unseen and (unseen < 0 or unseen >= kv_length or pattern.reach is not None):
        raise UnsupportedModelError(
            f"attention_mask: queries {first_query}..{first_query + q_length} do not end where keys "
            f"{kv_offset}..{kv_offset + kv_length} end: run with use_cache=False"
        )
    keys, key_range = kv_length - unseen, None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise UnsupportedModelError(
                f"attention_mask: must be [B, S] with one entry for each token, got shape {tuple(attention_mask.shape)}"
            )
        exists = attention_mask[:, kv_offset : kv_offset + keys].to(torch.bool)
        if exists.shape[1] < keys:
            raise UnsupportedModelError(f"attention_mask: has {exists.shape[1]} entries for {keys} keys")
        if not bool(exists.all()):
            key_range = engines.key_range_of(exists, "attention_mask").to(device)
    return dataclasses.replace(pattern, keys=keys, unseen=unseen, key_range=key_range)


def intersection(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The keys ``[B, 2]`` that are in both ranges; None is every key."""
    if first is None or second is None:
        return second if first is None else first
    start = torch.maximum(first[:, 0], second[:, 0])
    return torch.stack([start, torch.maximum(start, torch.minimum(first[:, 1], second[:, 1]))], -1)


def _classify(
    mask_function: Callable[..., torch.Tensor] | None,
    batch: int,
    queries: int,
    keys: int,
    first_query: int,
    first_key: int,
    local_size: int | None,
    device: torch.device | str,
) -> KeyPattern:
    """The pattern that a mask function has at its edges; an error where it has none of those that exist."""
    if mask_function is None:
        return KeyPattern(queries, keys, True, local_size, None)
    query = (torch.arange(queries, device=device) + first_query).expand(batch, queries)  # [B, T]
    row = torch.arange(batch, device=device)[:, None]
    last_key = first_key + keys - 1

    def sees(key: torch.Tensor) -> torch.Tensor:
        """Whether each query sees its ``key`` ``[B, T]``; False outside the keys."""
        visible = torch.as_tensor(mask_function(row, 0, query, key.clamp(first_key, last_key)), device=device)
        return visible.expand(batch, queries) & (key >= first_key) & (key <= last_key)

    # A document starts where a query does not see the key before its own. With a window of 1, every query is so.
    starts = ~sees(query - 1) & (query > first_key)
    if local_size == 1 or queries != keys:
        starts = torch.zeros_like(starts)
    first = torch.where(starts, query, first_key).cummax(dim=1).values  # [B, T]
    following = torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], dim=1)
    ends = torch.where(following, query, last_key).flip(1).cummin(dim=1).values.flip(1)
    ends = torch.where(ends == query[:, -1:], last_key, ends)

    def agrees(low: torch.Tensor, high: torch.Tensor) -> bool:
        """Whether what each query sees starts at ``low`` and ends at ``high``."""
        low, high = torch.maximum(low, first), torch.minimum(high, ends)
        return bool((sees(low) & sees(high) & sees(query.clamp(max=last_key)) & ~sees(low - 1) & ~sees(high + 1)).all())

    documents = None
    if bool(starts.any()):
        each = [(0, *one.nonzero()[:, 0].tolist()) for one in starts]
        documents = (each[0],) if all(one == each[0] for one in each) else tuple(each)
    shape = KeyPattern(queries, keys, True, None, None, None, documents)
    if agrees(first, ends):
        # One key, or one query that sees all of them, is causal and bidirectional at once.
        return dataclasses.replace(shape, causal=False)
    if agrees(first, query):
        return shape
    if local_size is not None and agrees(query - local_size + 1, query):
        return dataclasses.replace(shape, window=local_size)
    if local_size is not None and agrees(query - local_size, query + local_size):
        return dataclasses.replace(shape, causal=False, reach=local_size)
    reason = (
        "is neither causal, windowed nor bidirectional, over whole rows or over documents (blocks that see ahead, or "
        "a mask of another kind), and an arbitrary mask cannot be applied in O(T) memory"
    )
    return dataclasses.replace(shape, refused=reason)


def packed(name: str, pattern: KeyPattern, queries: torch.Tensor, keys: torch.Tensor | None) -> KeyPattern:
    """A pattern with the documents that start where cumulative lengths say."""
    starts = [int(one) for one in queries]
    if keys is not None and starts != [int(one) for one in keys]:
        raise UnsupportedModelError(f"{name}: cu_seq_lens_q and cu_seq_lens_k differ")
    if starts[0] != 0 or starts[-1] != pattern.queries or pattern.queries != pattern.keys:
        raise UnsupportedModelError(
            f"{name}: cu_seq_lens_q must start at 0 and end at {pattern.queries}, got {starts[:8]}"
        )
    documents = (tuple(dict.fromkeys(starts[:-1])),)
    if pattern.documents not in (None, documents):
        raise UnsupportedModelError(
            f"{name}: cu_seq_lens_q says that documents start at {documents[0][:8]}, and the mask says "
            f"{pattern.documents[0][:8] if pattern.documents else ''}"
        )
    return pattern if len(documents[0]) == 1 else dataclasses.replace(pattern, documents=documents)


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


def recognise(mask: torch.Tensor, batch: int, queries: int, keys: int) -> KeyPattern | str:
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
    found = KeyPattern(queries, keys, False, None, key_range)
    if _agrees(keep, found):
        return found
    for keys_seen, window in _diagonals(keep[:, 0], exists) if queries > 1 and keep.shape[2] > 1 else ():
        inside = None if key_range is None else key_range.clamp(max=keys_seen)
        if bool(exists[:, :keys_seen].all()):
            inside = None
        found = KeyPattern(queries, keys_seen, True, window, inside, unseen=keys - keys_seen)
        if _agrees(keep, found):
            return found
    return "is neither causal, windowed nor padding, and an arbitrary mask cannot be applied in O(T) memory"


def _agrees(keep: torch.Tensor, pattern: KeyPattern) -> bool:
    """Whether a mask ``[B or 1, 1, T or 1, S]`` (True: seen) is what a pattern says."""
    want = visible(
        keep.shape[2],
        pattern.keys,
        causal=pattern.causal,
        window=pattern.window,
        key_range=None if pattern.key_range is None else pattern.key_range[: keep.shape[0]],
        device=keep.device,
    )
    return bool((keep[..., : pattern.keys] == want).all()) and not bool(keep[..., pattern.keys :].any())


def _diagonals(keep: torch.Tensor, exists: torch.Tensor) -> list[tuple[int, int | None]]:
    """Which causal masks ``[B or 1, T, S]`` may be: how many keys there are up to the last query's own, and a window.

    The last key may be the last query's own, as without a cache. Else a query that does not see its row's last key
    ``[B or 1, S]`` sees its own one last, and one that does not see the row's first sees as many as the window has.
    """
    queries, keys = keep.shape[1:]
    low, high = _ends(keep)
    first, last = _ends(exists)
    own = torch.arange(queries, device=keep.device) - queries  # and as many keys as there are
    seen_by = [keys]
    some = keep.any(-1)
    stops = some & (high < last[:, None])
    if bool(stops.any()):
        seen_by.append(int((high - own)[stops].max()))
    found: list[tuple[int, int | None]] = []
    for count in dict.fromkeys(seen_by):
        if not 0 < count <= keys:
            continue
        found.append((count, None))
        starts = some & (low > first[:, None])
        if bool(starts.any()):
            found.append((count, int((own + count + 1 - low)[starts].max())))
    return [(count, window) for count, window in found if window is None or window > 0]


def _ends(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last that is True in ``[..., S]``, where any is."""
    each = keep.view(torch.uint8)
    return each.argmax(-1), keep.shape[-1] - 1 - each.flip(-1).argmax(-1)
