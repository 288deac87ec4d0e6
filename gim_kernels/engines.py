"""Which code runs an operator, and what it accepts."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd import forward_ad

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


def autocasts(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on for tensors on devices of a type."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in the types in which torch hands them to its own attention: as they are, but under ``torch.autocast``.

    That casts what is floating point and not float64 to its lower type, one tensor at a time.
    """
    if not any(isinstance(x, torch.Tensor) and autocasts(x.device.type) for x in tensors):
        return tensors
    return tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, torch.Tensor) and x.dtype in DTYPES and x.dtype != torch.float64 and autocasts(x.device.type)
        else x
        for x in tensors
    )


def as_given(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside it, products of tensors like ``x`` are in the types of their factors, under ``torch.autocast`` too."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


def check_transforms(operator: str, *tensors: torch.Tensor | None) -> None:
    """Raise where torch would differentiate an operator in a way that its own backward does not serve.

    Forward-mode derivatives would be 0 without a word, and ``torch.func.grad`` fails inside torch. ``torch.vmap``
    works, one call after the other.

    Args:
        operator: name of the public function.
        tensors: its inputs.

    Raises:
        RuntimeError: inside ``torch.func.grad``, ``vjp`` or the like, or with forward-mode tangents.
    """
    if torch.compiler.is_compiling():
        return
    kinds = {level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()}
    found = None
    if "Jvp" in kinds or any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        found = "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad)"
    elif "Grad" in kinds:
        found = "torch.func.grad, vjp and the like"
    if found:
        raise RuntimeError(
            f"gim_kernels.{operator} has a backward of its own, which {found} cannot use: "
            f"call torch.autograd.grad, or gim_kernels.reference.{operator}"
        )


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
