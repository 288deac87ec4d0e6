"""What public functions ask of their arguments, which may be anything: at every call, and so in few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from gim_kernels.types import DTYPES

Word = TypeVar("Word", bound=str)


def are_finite(factors: Any, count: int) -> bool:
    """Whether factors are so many finite numbers."""
    try:
        return len(factors) == count and all(map(math.isfinite, factors))
    except (TypeError, ValueError, RuntimeError):
        return False


def is_between(low: float, x: Any, high: float) -> bool:
    """Whether an argument is a number above ``low`` and below ``high``."""
    try:
        return bool(low < x < high)
    except (TypeError, ValueError, RuntimeError):
        return False


def number(name: str, x: Any) -> float:
    """A number that an argument is, of whatever type.

    Raises:
        TypeError: it is none.
    """
    try:
        if not isinstance(x, str | bytes):
            return float(x)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a number, got {x!r:.80}")


def choice(name: str, x: Any, words: Sequence[Word]) -> Word:
    """One of some words that an argument is.

    Raises:
        ValueError: it is none.
    """
    try:
        if x in words:
            found: Word = x
            return found
    except (TypeError, ValueError, RuntimeError):  # an array compares entry by entry
        pass
    raise ValueError(f"{name} must be one of {words}, got {x!r:.80}")


def check_tensor(name: str, x: Any) -> None:
    """Raise unless an argument is a dense tensor of a type that operators know.

    Raises:
        TypeError: it is not.
    """
    try:
        dtype, layout = x.dtype, x.layout
    except AttributeError:
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}") from None
    if layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {layout}")
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {dtype}")
