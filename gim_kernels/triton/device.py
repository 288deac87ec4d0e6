"""Where the kernels run: checks before a launch, and the device a launch goes to."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl

#: Floating-point types the kernels know; float64 belongs to the other engines.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Oldest CUDA compute capability, and the AMD architectures, that the kernels are compiled for.
CUDA_AT_LEAST = (8, 0)
HIP = ("gfx90a", "gfx942", "gfx950")


@triton.jit
def _probe() -> None:
    tl.static_assert(True)


def interpreted() -> bool:
    """Whether triton runs kernels in its interpreter, on CPUs (``TRITON_INTERPRET=1`` when this was imported)."""
    return not isinstance(_probe, triton.JITFunction)


@functools.cache
def _check_architecture(index: int) -> None:
    """Raise unless the kernels support CUDA or HIP device ``index``."""
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        supported = name in HIP
    else:
        name = f"sm_{properties.major}{properties.minor}"
        supported = (properties.major, properties.minor) >= CUDA_AT_LEAST
    if not supported:
        raise RuntimeError(
            f"the triton engine supports CUDA GPUs from sm_{CUDA_AT_LEAST[0]}{CUDA_AT_LEAST[1]} on and the AMD GPUs "
            f'{", ".join(HIP)}; {properties.name} is {name}: choose engine="blockwise" or "reference"'
        )


def check(**tensors: torch.Tensor | None) -> None:
    """Raise unless the kernels can take these tensors.

    Args:
        tensors: by the name an error shall use; None is passed over.

    Raises:
        TypeError: a dtype the kernels do not know.
        RuntimeError: a CPU tensor outside triton's interpreter, or a GPU the kernels do not support.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16 for the triton engine, got {x.dtype}: "
                'cast it, or use engine="blockwise" or "reference" (gim_kernels.reference)'
            )
        if x.is_cuda:
            _check_architecture(x.get_device())
        elif not interpreted():
            raise RuntimeError(
                f'engine="triton" needs tensors on a GPU, got {name} on {x.device}: '
                'choose engine="blockwise" or "reference"'
            )


_NOTHING = contextlib.nullcontext()


def guard(x: torch.Tensor) -> AbstractContextManager[Any]:
    """A context in which launches go to the device of ``x`` and to its current stream."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _NOTHING
