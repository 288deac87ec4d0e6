"""Which code runs an operator, and what it accepts."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from gim_kernels.arguments import choice
from gim_kernels.types import DTYPES, ENGINES, AttentionEngine, Engine, PointwiseEngine

if TYPE_CHECKING:
    # What import_module hides: each module of the tables below is what its Protocol says, or mypy fails here.
    from gim_kernels import blockwise, composed, pointwise, reference_engine, triton

    _ATTENTION: tuple[AttentionEngine, ...] = (triton, composed, blockwise, reference_engine)
    _POINTWISE: tuple[PointwiseEngine, ...] = (triton, pointwise, reference_engine)

_TRITON, _REFERENCE = "gim_kernels.triton", "gim_kernels.reference_engine"
#: The module that runs attention by each engine; loaded when it first runs.
ATTENTION: dict[str, str] = {
    "triton": _TRITON,
    "composed": "gim_kernels.composed",
    "blockwise": "gim_kernels.blockwise",
    "reference": _REFERENCE,
}
#: The same for norms and gated products; ``"composed"`` is made of attention, and has none.
POINTWISE: dict[str, str] = {"triton": _TRITON, "blockwise": "gim_kernels.pointwise", "reference": _REFERENCE}


@functools.cache
def _module(name: str) -> Any:
    if name == _TRITON and importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            'engine="triton" needs the package triton, which is not installed here (it exists for Linux): '
            'choose engine="blockwise" or "reference"'
        )
    return importlib.import_module(name)


@functools.cache
def attention(engine: Engine) -> AttentionEngine:
    """The engine of that name, other than ``"auto"``, for attention.

    Raises:
        RuntimeError: triton is asked for and not installed here.
    """
    found: AttentionEngine = _module(ATTENTION[engine])
    return found


def takes_several(engine: Engine) -> bool:
    """Whether an engine's backwards compute once what several gradients of one output share."""
    return engine == "blockwise"


@functools.cache
def pointwise_of(engine: Engine) -> PointwiseEngine:
    """The same for norms and gated products."""
    found: PointwiseEngine = _module(POINTWISE[engine])
    return found


def check_name(engine: str) -> Engine:
    """The name itself, if it is an engine's.

    Raises:
        ValueError: it is not.
    """
    return choice("engine", engine, ENGINES)


def choose(engine: str, x: torch.Tensor) -> Engine:
    """The engine that will run attention on ``x``.

    ``"auto"`` is Triton for tensors on a GPU and blockwise for all others; a CUDA tensor never gets another
    engine unless it is asked for by name.

    Raises:
        ValueError: a name that is not an engine.
    """
    name = check_name(engine)
    if name == "auto":
        return "triton" if x.device.type == "cuda" else "blockwise"
    return name


def choose_pointwise(engine: str, x: torch.Tensor) -> Engine:
    """The engine that will run a norm or a gated product on ``x``: under ``"composed"``, the one of ``"auto"``."""
    chosen = choose(engine, x)
    return chosen if chosen in POINTWISE else choose("auto", x)


def check(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless an engine can run tensors of a type on a device; tensors without data, on meta, may go anywhere.

    Raises:
        ValueError: a name that is not an engine.
        TypeError: a dtype that the engine does not know.
        RuntimeError: a device on which it cannot run, or a package that it needs is not installed.
    """
    check_name(engine)
    if device.type == "meta" or choose(engine, torch.empty(0, device=device)) != "triton":
        return
    _module(_TRITON)
    importlib.import_module("gim_kernels.triton.device").check(model=torch.empty(0, device=device, dtype=dtype))


def checked_kernels(device: torch.device) -> str | None:
    """What is known of the Triton kernels on a device, in words; None where they do not run as compiled code.

    A variant is verified where it has been held against the reference on such a device before, or else at its first use
    in a process.
    """
    if device.type != "cuda" or _TRITON not in sys.modules:
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    verified = importlib.import_module("gim_kernels.triton.verified")
    found = importlib.import_module("gim_kernels.triton.selfcheck").found_right(index)
    return (
        f"on {verified.device_name(index)} {len(verified.on_device(index))} kernels have been verified before, and "
        f"{len(found)} were held against the reference in this process"
    )


def autocasts(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on for tensors on devices of a type."""
    if not torch._C._is_any_autocast_enabled():
        return False
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in the types in which torch hands them to its own attention: as they are, but under ``torch.autocast``.

    That casts what is floating point and not float64 to its lower type, one tensor at a time.
    """
    if not torch._C._is_any_autocast_enabled():
        return tensors
    return tuple(
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, torch.Tensor) and x.dtype in DTYPES and x.dtype != torch.float64 and autocasts(x.device.type)
        else x
        for x in tensors
    )


_NOTHING = contextlib.nullcontext()


def as_given(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside it, products of tensors like ``x`` are in the types of their factors, under ``torch.autocast`` too."""
    if not torch._C._is_any_autocast_enabled() or not autocasts(x.device.type):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


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
    levels = torch._C._functorch.get_interpreter_stack()
    inside = forward_ad._current_level >= 0  # of a level of forward-mode derivatives, without which there is no tangent
    if not levels and not inside:
        return
    kinds = {level.key().name for level in levels or ()}
    found = None
    if "Jvp" in kinds or (
        inside and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    ):
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
