"""Which code runs an operator, and what it accepts."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

Engine = Literal["auto", "triton", "blockwise", "reference"]
ENGINES: tuple[Engine, ...] = ("auto", "triton", "blockwise", "reference")

#: Floating-point types of every operator.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """What shapes attention's forward, the same for every engine.

    Args:
        scale: factor on ``query @ key.T``.
        causal: bottom-right aligned causal mask.
        window: a query at key position ``p`` sees keys ``j > p - window`` only; None for all.
        softcap: ``c`` of ``c * tanh(score / c)``; None for none.
    """

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None


def module(engine: Engine, eager: Any) -> Any:
    """The module whose functions run an operator: ``eager``, or ``gim_kernels.triton`` for the engine of that name.

    Raises:
        RuntimeError: triton is asked for and not installed here.
    """
    if engine != "triton":
        return eager
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            'engine="triton" needs the package triton, which is not installed here (it exists for Linux): '
            'choose engine="blockwise" or "reference"'
        )
    return importlib.import_module("gim_kernels.triton")


def choose(engine: str, x: torch.Tensor) -> Engine:
    """The engine that will run an operator on ``x``.

    ``"auto"`` is Triton for tensors on a GPU and blockwise for all others; a CUDA tensor never gets another
    engine unless it is asked for by name.

    Raises:
        ValueError: a name that is not an engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    if engine == "auto":
        return "triton" if x.device.type == "cuda" else "blockwise"
    return engine


def key_range_of(exists: torch.Tensor, argument: str) -> torch.Tensor:
    """First and one-past-last key of each row of a padding mask.

    Args:
        exists: ``[B, S]`` booleans, True where the key exists.
        argument: how the mask is called in the error.

    Returns:
        ``[B, 2]`` int32; ``[0, 0]`` for a row without keys.

    Raises:
        ValueError: a row has a hole: a missing key between two that exist.
    """
    exists = exists.to(torch.bool)
    keys = exists.shape[1]
    count = exists.sum(-1)
    first = exists.to(torch.int32).argmax(-1)
    end = torch.where(count > 0, keys - exists.flip(-1).to(torch.int32).argmax(-1), 0)
    holes = (end - first) != count
    if bool(holes.any()):
        row = int(holes.nonzero()[0, 0])
        raise ValueError(
            f"{argument} must have no holes: row {row} has {int(count[row])} visible keys between key "
            f"{int(first[row])} and key {int(end[row]) - 1}"
        )
    return torch.stack([first, end], dim=-1).to(torch.int32)
