"""Tensors kept in host memory between the forward and the backward, in buffers that are reused."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: Copies to the host that may be under way at once: the layer that is running hides one, the next one's the other.
IN_FLIGHT = 2

#: Told of tensors that outlive the code that made them: what they are kept for, and the tensor.
Watch = Callable[[str, torch.Tensor], None]


class HostPool:
    """Host buffers of one model, reused from run to run and freed with it.

    Args:
        pinned: whether the memory is page-locked, so that a GPU copies without the processor.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.allocations = 0
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)

    def take(self, size: int, device: torch.device) -> torch.Tensor:
        """A buffer of ``size`` bytes; ``device`` is the host's, or the one without memory for a dry run."""
        if self._free[size]:
            return self._free[size].pop()
        self.allocations += 1
        return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=self.pinned)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        self._free[buffer.numel()].append(buffer)

    def drop_all_but(self, sizes: set[int]) -> None:
        """Free the buffers of other sizes: a pool never holds more than the run before it needed."""
        for size in list(self._free):
            if size not in sizes:
                del self._free[size]

    @property
    def held_bytes(self) -> int:
        """Bytes in buffers that nobody uses now."""
        return sum(size * len(buffers) for size, buffers in self._free.items())


_pools: weakref.WeakKeyDictionary[nn.Module, HostPool] = weakref.WeakKeyDictionary()


def forget_pool(model: nn.Module) -> None:
    """Free a model's buffers."""
    _pools.pop(model, None)


def pool_of(model: nn.Module, pinned: bool) -> HostPool:
    """The pool of a model, made at its first use."""
    pool = _pools.get(model)
    if pool is None or pool.pinned != pinned:
        pool = _pools[model] = HostPool(pinned)
    return pool


@dataclass(eq=False)
class Parked:
    """A tensor that waits in host memory.

    Args:
        group: position of its layer; those of one group are fetched together.
        host: the buffer, uint8.
        shape, stride, dtype, device: of the tensor.
        fetched: the tensor on its way back, and the event that tells when it is there.
    """

    group: int
    host: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fetched: tuple[torch.Tensor, Any] | None = field(default=None)


def _dense_strides(x: torch.Tensor) -> tuple[int, ...]:
    """The strides of ``x`` where its elements fill one block of memory, else those of a contiguous copy."""
    order = sorted(range(x.dim()), key=lambda axis: (x.stride(axis), x.shape[axis]))
    expected, dense = 1, True
    for axis in order:
        dense = dense and (x.shape[axis] == 1 or x.stride(axis) == expected)
        expected *= x.shape[axis]
    return tuple(x.stride()) if dense else tuple(torch.empty(x.shape, device="meta").stride())


class Offload:
    """One run's tensors in host memory: :meth:`pack` sends one there, :meth:`unpack` brings it back.

    On a GPU, copies run on a stream of their own: to the host while the next layers compute, and back one group
    ahead of the backward. Elsewhere they are plain copies in ordinary memory.

    Args:
        pool: where buffers come from.
        device: where the tensors are.
        watch: told of each buffer, and of the copies that are under way.
        ahead: whether to hold copies under way as a GPU does; None to decide by the device.
        several: whether tensors are wanted back more than once; buffers are then free at the end only.
    """

    def __init__(
        self,
        pool: HostPool,
        device: torch.device,
        watch: Watch | None = None,
        ahead: bool | None = None,
        several: bool = False,
    ) -> None:
        self._pool = pool
        self._watch = watch
        self._several = several
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._groups: dict[int, list[Parked]] = defaultdict(list)
        self._sizes: set[int] = set()
        self._under_way: deque[tuple[torch.Tensor, Any]] = deque()

    def pack(self, x: torch.Tensor, group: int) -> Parked:
        """Send a tensor to the host."""
        size = x.numel() * x.element_size()
        host = self._pool.take(size, x.device if x.is_meta else torch.device("cpu"))
        self._sizes.add(size)
        parked = Parked(group, host, x.shape, _dense_strides(x), x.dtype, x.device)
        self._groups[group].append(parked)
        if self._watch is not None:
            self._watch("host", host)
        if self._stream is None:
            self._view(parked).copy_(x)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self._stream):
                self._view(parked).copy_(x, non_blocking=True)
                event = self._stream.record_event()
            x.record_stream(self._stream)
        if self._ahead:
            self._under_way.append((x, None if self._stream is None else event))
            if len(self._under_way) > IN_FLIGHT:
                # Without this the processor would queue every layer, and their inputs would all wait on the GPU.
                _, done = self._under_way.popleft()
                if done is not None:
                    done.synchronize()
        return parked

    def unpack(self, parked: Parked) -> torch.Tensor:
        """The tensor, back on its device; but where it is wanted again, its buffer is free and this works once."""
        self._under_way.clear()
        if self._ahead:
            for other in self._groups[parked.group]:
                self._fetch(other)
            before = [group for group, waiting in self._groups.items() if group < parked.group and waiting]
            for other in self._groups[max(before)] if before else ():
                self._fetch(other)
        else:
            self._fetch(parked)
        assert parked.fetched is not None
        x, event = parked.fetched
        if event is not None:
            current = torch.cuda.current_stream(parked.device)
            current.wait_event(event)
            x.record_stream(current)
        parked.fetched = None
        if self._several:
            return x
        self._groups[parked.group].remove(parked)
        # On a GPU the next copy into this buffer runs on the same stream, so after this one out of it.
        self._pool.give(parked.host)
        return x

    def close(self) -> None:
        """Give every buffer back, those of a run that failed too."""
        if self._stream is not None:
            self._stream.synchronize()
        for waiting in self._groups.values():
            for parked in waiting:
                self._pool.give(parked.host)
        self._groups.clear()
        self._under_way.clear()
        self._pool.drop_all_but(self._sizes)

    def _fetch(self, parked: Parked) -> None:
        if parked.fetched is not None:
            return
        if self._stream is None:
            x = torch.empty_strided(parked.shape, parked.stride, dtype=parked.dtype, device=parked.device)
            parked.fetched = (x.copy_(self._view(parked)), None)
            return
        with torch.cuda.stream(self._stream):
            x = torch.empty_strided(parked.shape, parked.stride, dtype=parked.dtype, device=parked.device)
            x.copy_(self._view(parked), non_blocking=True)
            parked.fetched = (x, self._stream.record_event())

    @staticmethod
    def _view(parked: Parked) -> torch.Tensor:
        """The host buffer with the tensor's type, shape and strides."""
        return parked.host.view(parked.dtype).as_strided(parked.shape, parked.stride)
