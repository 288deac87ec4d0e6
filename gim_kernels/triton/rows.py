"""Strided tensors as rows: any leading dimensions become at most three, without a copy where strides allow it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

#: How many leading dimensions of different strides the kernels walk.
LEADING = 3
#: Rows are numbered in int32; element offsets are int64.
MOST_ROWS = 2**31 - 1

Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Rows:
    """The shape all given tensors share, as rows.

    Row ``(i0 * size1 + i1) * size2 + i2`` of tensor ``t`` starts at the sum of ``i * strides[t]``, in elements;
    ``strides[t]`` is None for a tensor that is absent.
    """

    count: int
    columns: int
    size1: int
    size2: int
    strides: tuple[tuple[int, int, int] | None, ...]

    @property
    def merged(self) -> bool:
        """Whether one leading dimension is left: the kernels then need no division."""
        return self.size2 == self.count

    def arguments(self, *names: str) -> dict[str, int | None]:
        """Sizes and, by each tensor's name, strides of a launch; None what is absent or merged away."""
        several = not self.merged
        found: dict[str, int | None] = {
            "rows": self.count,
            "columns": self.columns,
            "size1": self.size1 if several else None,
            "size2": self.size2 if several else None,
        }
        for name, strides in zip(names, self.strides, strict=True):
            for dimension in range(LEADING):
                needed = strides is not None and (several or dimension == LEADING - 1)
                found[f"{name}_stride{dimension}"] = strides[dimension] if needed and strides else None
        return found


def rows_of(*tensors: torch.Tensor | None) -> Rows | None:
    """Rows of tensors of one shape ``[..., D]``; the first is present.

    Returns:
        None where some tensor's last dimension has a stride other than 1 (and more than one element), or where more
        than :data:`LEADING` leading dimensions remain after those that lie next to each other are merged.

    Raises:
        ValueError: more rows than int32 can number.
    """
    present = [x for x in tensors if x is not None]
    shape = present[0].shape
    columns = shape[-1]
    if columns > 1 and any(x.stride(-1) != 1 for x in present):
        return None
    sizes: list[int] = []
    strides: list[list[int]] = []  # [dimension][tensor]
    for dimension, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        here = [x.stride(dimension) for x in present]
        if sizes and all(outer == inner * size for outer, inner in zip(strides[-1], here, strict=True)):
            sizes[-1] *= size
            strides[-1] = here
        else:
            sizes.append(size)
            strides.append(here)
    if len(sizes) > LEADING:
        return None
    if not sizes:  # one row
        sizes, strides = [1], [[columns] * len(present)]
    missing = LEADING - len(sizes)
    sizes = [1] * missing + sizes
    strides = [[0] * len(present)] * missing + strides
    count = sizes[0] * sizes[1] * sizes[2]
    if count > MOST_ROWS:
        raise ValueError(f"x must have at most {MOST_ROWS} rows for the triton engine, got {count}")
    by_tensor = iter(zip(*strides, strict=True))
    return Rows(count, columns, sizes[1], sizes[2], tuple(None if x is None else next(by_tensor) for x in tensors))


def as_rows(*tensors: torch.Tensor | None) -> tuple[Rows, Tensors]:
    """Rows of tensors of one shape, copying into contiguous memory only what the kernels cannot walk."""
    rows, found = rows_of(*tensors), tensors
    if rows is None:  # tensors that have no rows on their own
        found = tuple(x if x is None or rows_of(x) is not None else x.contiguous() for x in found)
        rows = rows_of(*found)
    if rows is None:  # tensors whose leading dimensions do not merge alike
        found = tuple(None if x is None else x.contiguous() for x in found)
        rows = rows_of(*found)
    assert rows is not None  # contiguous tensors have one leading dimension
    return rows, found


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x`` without gaps; None stays None."""
    return None if x is None else x.contiguous()


@triton.jit
def row_offset(row, size1, size2, stride0, stride1, stride2):
    """Element offset (int64) of the start of each of the rows ``row`` (int32); see :class:`Rows`.

    With one leading dimension ``size1``, ``size2``, ``stride0`` and ``stride1`` are None.
    """
    if size1 is None:
        offset = row.to(tl.int64) * stride2
    else:
        outer = row // size2
        inner = row - outer * size2
        first = outer // size1
        middle = outer - first * size1
        offset = first.to(tl.int64) * stride0 + middle.to(tl.int64) * stride1 + inner.to(tl.int64) * stride2
    return offset
