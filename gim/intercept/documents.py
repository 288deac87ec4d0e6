"""Several documents in one row: the short ones run together, so that a row of many costs few calls of attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from gim.intercept.masks import KeyPattern

#: Tokens up to which documents are filled up to the longest of those of about their length. One of more tokens keeps
#: a device busy by itself, and is not copied.
SHORT = 512


class Attend(Protocol):
    """What runs documents, each a row of a batch: attention ``[B, HQ, T, D]``."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: KeyPattern, /
    ) -> torch.Tensor: ...


def attend_within(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: KeyPattern,
    starts: Sequence[int],
    attend: Attend,
) -> torch.Tensor:
    """Attention ``[B, HQ, T, D]`` within documents, in O(T) memory.

    Args:
        query: ``[B, HQ, T, D]``; ``key`` and ``value``: ``[B, HK, T, D]``.
        pattern: what holds within each document; its ``key_range`` is of the whole row.
        starts: where the documents of every row start, 0 first.
        attend: what runs some of them.
    """
    parts = []
    read = [0] * pattern.queries  # where among the parts, one after another, each token is
    done = 0
    for some in _alike(list(pairwise((*starts, pattern.queries)))):
        out = _together(query, key, value, pattern, some, attend)
        longest = out.shape[2] // len(some)
        for place, (start, end) in enumerate(some):
            first = done + place * longest
            read[start:end] = range(first, first + end - start)
        parts.append(out)
        done += out.shape[2]
    whole = torch.cat(parts, dim=2)
    return whole if read == list(range(done)) else whole.index_select(2, torch.tensor(read, device=query.device))


def _alike(bounds: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Documents by their first and one-past-last tokens, those to run together in one list."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in bounds:
        length = end - start
        # Numbers of as many binary digits: filled up, documents of such lengths are less than twice as many tokens.
        groups.setdefault(length.bit_length() if length <= SHORT else -end, []).append((start, end))
    return list(groups.values())


def _together(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: KeyPattern,
    some: Sequence[tuple[int, int]],
    attend: Attend,
) -> torch.Tensor:
    """Attention of some documents, one after another and each as long as the longest: ``[B, HQ, N * longest, D]``."""
    lengths = [end - start for start, end in some]
    longest = max(lengths)
    ranges = _ranges(pattern.key_range, some, len(query), query.device)
    inner = KeyPattern(longest, longest, pattern.causal, pattern.window, ranges, pattern.reach)
    if len(some) == 1:
        start, end = some[0]
        return attend(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], inner)
    # A document is filled up with its last token again, as a key that does not exist and a query that nobody reads.
    places = torch.tensor([min(start + i, end - 1) for start, end in some for i in range(longest)], device=query.device)

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.index_select(2, places).unflatten(2, (len(some), longest)).transpose(1, 2).flatten(0, 1)

    out = attend(rows(query), rows(key), rows(value), inner)
    return out.unflatten(0, (len(query), len(some))).transpose(1, 2).flatten(2, 3)


def _ranges(
    within: torch.Tensor | None, some: Sequence[tuple[int, int]], batch: int, device: torch.device
) -> torch.Tensor | None:
    """The keys that exist in each document of each row, ``[B * N, 2]``; None where all do.

    Args:
        within: the same of the whole row, ``[B, 2]``.
    """
    first, last = torch.tensor(some, dtype=torch.int32, device=device).T  # [N]
    lengths = last - first
    if within is not None:
        ranges = (within.to(device)[:, None] - first[:, None]).clamp_min(0).minimum(lengths[:, None])
    elif len({end - start for start, end in some}) > 1:
        ranges = torch.stack([torch.zeros_like(lengths), lengths], dim=-1).expand(batch, -1, -1)
    else:
        return None
    return ranges.flatten(0, 1)
