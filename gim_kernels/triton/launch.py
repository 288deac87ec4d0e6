"""What the attention launchers share: checks, strides, and the numbers a kernel wants."""

from __future__ import annotations

from typing import Any

import torch

from gim_kernels.triton import tiles
from gim_kernels.triton.device import check
from gim_kernels.triton.dispatch import ALIGNMENT, Box
from gim_kernels.triton.order import section_of
from gim_kernels.triton.primitives import LOG2E
from gim_kernels.types import Options

#: Largest head size; wider rows do not fit on the chip.
LARGEST_HEAD = 256
#: Elements from one row to the next, below which a tile of 256 rows spans less than int32 can number.
LARGEST_STRIDE = 2**22
#: Bytes below which a descriptor's strides are; they and its address are multiples of ALIGNMENT.
LARGEST_STEP = 2**40
#: A scale of 0 becomes this, so that -inf times it stays -inf: scores of 1e20 still vanish.
SMALLEST_FACTOR = 1e-30


def check_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise, before anything is launched, where the kernels cannot take these tensors.

    Raises:
        TypeError, RuntimeError: as :func:`gim_kernels.triton.device.check`.
        ValueError: a head size above :data:`LARGEST_HEAD`, or more programs or positions than int32 can number.
    """
    check(query=query, key=key, value=value)
    if query.shape[-1] > LARGEST_HEAD:
        raise ValueError(
            f"query must have a head size of at most {LARGEST_HEAD} for the triton engine, got {query.shape[-1]}: "
            'choose engine="blockwise" or "reference"'
        )
    for name, x in (("query", query), ("key", key)):
        # Every program does at least 16 rows; positions of queries and keys are int32.
        if x.shape[0] * x.shape[1] * (x.shape[2] // 16 + 1) >= 2**31 or x.shape[2] >= 2**30:
            raise ValueError(f"{name} is too large for the triton engine: {tuple(x.shape)}")


def readable(x: torch.Tensor) -> bool:
    """Whether the kernels can walk ``x`` ``[B, H, T, D]``: unit stride in a row, int32 offsets in a tile of rows."""
    return (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(-2) < LARGEST_STRIDE


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where the kernels can walk it, a contiguous copy elsewhere."""
    return x if readable(x) else x.contiguous()


def as_walked(x: torch.Tensor) -> torch.Tensor:
    """A tensor with the layout of ``unit_stride(x)``; without data where that is a copy."""
    return x if readable(x) else torch.empty(x.shape, dtype=x.dtype, device="meta")


def strides(name: str, x: torch.Tensor, row: str) -> dict[str, int]:
    """The arguments ``<name>_stride_b``, ``_h`` and ``_<row>`` of a tensor ``[B, H, T or S, D]``, in elements."""
    batch, head, step, _ = x.stride()
    return {f"{name}_stride_b": batch, f"{name}_stride_h": head, f"{name}_stride_{row}": step}


def described(architecture: str, softcap: float | None, key_range: torch.Tensor | None, *tensors: torch.Tensor) -> bool:
    """Whether the kernels read ``tensors`` ``[B, H, T, D]`` through tensor descriptors: of two bytes, and aligned.

    With a key range they do not: rows outside it may hold anything, and pointers pass over them. Nor with a softcap,
    whose registers the larger tiles do not have.
    """
    if architecture not in tiles.DESCRIBED or softcap is not None or key_range is not None:
        return False
    return all(_describable(x) for x in tensors)


def _describable(x: torch.Tensor) -> bool:
    if x.element_size() != 2 or x.numel() == 0 or x.data_ptr() % ALIGNMENT or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return False
    steps = [2 * stride for stride, count in zip(x.stride()[:-1], x.shape, strict=False) if count > 1]
    return all(0 < step < LARGEST_STEP and step % ALIGNMENT == 0 for step in steps)


def matrices(variant: tiles.Variant, **tensors: torch.Tensor) -> dict[str, Any]:
    """How a kernel reads ``tensors``, as :class:`gim_kernels.triton.dispatch.Launch` takes it: by strides, or through
    descriptors and with None for each stride."""
    given: dict[str, Any] = {}
    for name, x in tensors.items():
        row = "s" if name in ("key", "value") else "t"
        given |= strides(name, x, row)
        if variant.signature[f"{name}_ptr"].startswith("tensordesc"):
            given |= dict.fromkeys(strides(name, x, row))
            given[f"{name}_ptr"] = _box(x, variant.constants[f"BLOCK_{row.upper()}"], variant.constants["BLOCK_D"])
    return given


def _box(x: torch.Tensor, rows: int, columns: int) -> Box:
    # A dimension of one element may have any stride, which a descriptor must not.
    steps = [stride if count > 1 else ALIGNMENT for stride, count in zip(x.stride()[:-1], x.shape, strict=False)]
    return Box(tuple(x.shape), (*steps, 1), (1, 1, rows, columns))


def score_factors(options: Options) -> tuple[float, float | None]:
    """``factor`` and ``inner`` of :func:`gim_kernels.triton.primitives.raw_scores`; ``inner`` is None without a cap."""
    if options.softcap is None:
        return options.scale * LOG2E.value, None
    return options.softcap * LOG2E.value, options.scale / options.softcap


def hiding_window(options: Options, keys: int) -> int | None:
    """The window, or None where it is wide enough to hide no key."""
    return None if options.window is None or options.window >= keys else options.window


def query_section(tiles: int, query: torch.Tensor, key: torch.Tensor, causal: bool) -> int:
    """The section of a kernel over ``tiles`` query tiles a head; the query heads of a group share keys and values."""
    batch, heads = query.shape[:2]
    _, key_heads, keys, size = key.shape
    return section_of(tiles, batch * heads, heads // key_heads, 2 * keys * size * key.element_size(), causal)


def key_section(tiles: int, members: int, query: torch.Tensor, columns: int, causal: bool) -> int:
    """The section of a kernel over ``tiles`` key tiles: a column reads the queries and gradients of its members."""
    _, _, queries, size = query.shape
    return section_of(tiles, columns, 1, members * 2 * queries * size * query.element_size(), causal)
