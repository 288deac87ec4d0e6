"""How a launch costs little host time: all of it but the addresses is worked out once for each layout of the tensors.

triton binds, describes and looks up every argument of every launch again. A :class:`Launch` does so once for each
alignment of its pointers, and from then on hands the compiled kernel what triton would hand it, addresses in place of
tensors. Where somebody listens to launches, during a capture, on AMD GPUs (whose kernels also depend on how much memory
a pointer leads to) and in the interpreter, triton launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from gim_kernels.triton.device import interpreted
from gim_kernels.triton.tiles import Variant

#: Plans of one operator that are kept: a model has a few for each length of its input.
MOST_PLANS = 1024
#: Bytes of which an address is a multiple or not: what triton compiles different code for, and what TMA requires.
ALIGNMENT = 16

Plan = TypeVar("Plan")


class Plans(Generic[Plan]):
    """Calls of one function whose result depends on the layouts of tensors, kept.

    A layout is a shape, strides, a dtype, a device, and whether the address is aligned.

    Args:
        make: called with a tuple of tensors and Nones, and options that can be hashed.
    """

    def __init__(self, make: Callable[..., Plan]) -> None:
        self._make = make
        self._made: dict[Any, Plan] = {}

    def __call__(self, tensors: tuple[torch.Tensor | None, ...], *options: Any) -> Plan:
        """What ``make`` gives; in the interpreter, where nothing is kept, made anew."""
        if interpreted():
            return self._make(tensors, *options)
        key = (
            tuple(
                [
                    x if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), not x.data_ptr() % ALIGNMENT)
                    for x in tensors
                ]
            ),
            options,
        )
        plan = self._made.get(key)
        if plan is None:
            plan = self._make(tensors, *options)
            if len(self._made) >= MOST_PLANS:
                self._made.clear()
            self._made[key] = plan
        return plan

    def clear(self) -> None:
        """Forget all of them."""
        self._made.clear()


@dataclass(frozen=True)
class Box:
    """How a descriptor reads a tensor: its sizes and strides in elements, and the tile that one load brings."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def around(self, x: torch.Tensor) -> TensorDescriptor:
        """The descriptor; triton checks it."""
        return TensorDescriptor(x, list(self.shape), list(self.strides), list(self.block))


class _Notes(threading.local):
    names: list[str] | None = None


_notes = _Notes()


@contextmanager
def noted() -> Iterator[list[str]]:
    """Inside, the names of the variants that this thread launches; none of them is checked."""
    names: list[str] = []
    _notes.names = names
    try:
        yield names
    finally:
        _notes.names = None


def _listens(hook: Any) -> bool:
    """Whether a hook of triton's is a function, or a chain of some."""
    return bool(getattr(hook, "calls", hook))


def _odd(tensors: Sequence[torch.Tensor | None]) -> int:
    """A bit for each tensor whose address is not aligned."""
    return sum(1 << i for i, x in enumerate(tensors) if x is not None and x.data_ptr() % ALIGNMENT)


class _Compiled(NamedTuple):
    """What a launch hands over.

    Args:
        run, function, metadata: of the compiled kernel.
        device: the number of that on which it is loaded.
        described: of each descriptor its place among the kernel's arguments, that of its tensor among the tensors, and
            what it holds besides.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    device: int
    described: tuple[tuple[int, int, dict[str, Any]], ...]


class Launch:
    """A launch of a variant with everything given but its tensors.

    Args:
        variant: what runs.
        programs: how many.
        arguments: the kernel's, without pointers and without those in upper case; a :class:`Box` for each pointer that
            is read through a descriptor.
    """

    def __init__(self, variant: Variant, programs: int, **arguments: Any) -> None:
        self.variant, self.programs = variant, programs
        names = variant.kernel.arg_names
        self._boxes = {name: box for name, box in arguments.items() if isinstance(box, Box)}
        self._arguments = {name: value for name, value in arguments.items() if name not in self._boxes}
        values = {**variant.constants, **self._arguments}
        self._values = [values.get(name) for name in names]
        #: The kernel's pointers, and the places of all its pointers and of its descriptors among its arguments.
        self._pointers = [name for name in names if name.endswith("_ptr")]
        self._places = [names.index(name) for name in self._pointers]
        #: For each alignment of the pointers what triton compiled, as :meth:`_by_triton` left it.
        self._compiled: dict[int, _Compiled] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Run on the current device, where the tensors are, and its current stream.

        Args:
            tensors: of the kernel's pointers, in its order; None for those that the variant does not have.
        """
        values = self._values.copy()
        together = 0
        for place, x in zip(self._places, tensors, strict=True):
            if x is not None:
                values[place] = address = x.data_ptr()
                together |= address
        odd = _odd(tensors) if together % ALIGNMENT else 0
        known = self._compiled.get(odd)
        if known is None or self._triton_must():
            self._by_triton(tensors, odd)
            return
        for place, which, fields in known.described:
            descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__ = {**fields, "base": tensors[which]}
            values[place] = descriptor
        active: Any = driver.active
        stream = active.get_current_stream(known.device)
        # Triton takes an address for a tensor, and asks the driver no more whose it is.
        known.run(self.programs, 1, 1, stream, known.function, known.metadata, None, None, None, *values)

    def _triton_must(self) -> bool:
        runtime = knobs.runtime
        return (
            _notes.names is not None
            or bool(self.variant.kernel.pre_run_hooks)
            or _listens(runtime.launch_enter_hook)
            or _listens(runtime.launch_exit_hook)
            or _listens(runtime.add_stages_inspection_hook)
            or torch.cuda.is_current_stream_capturing()
        )

    def _by_triton(self, tensors: Sequence[torch.Tensor | None], odd: int) -> None:
        given: dict[str, Any] = dict(zip(self._pointers, tensors, strict=True))
        first = next(x for x in tensors if x is not None)
        for name, box in self._boxes.items():
            given[name] = box.around(given[name])
        if _notes.names is not None:
            _notes.names.append(self.variant.name)
        else:
            from gim_kernels.triton import selfcheck  # which runs the operators, and so this

            selfcheck.first_use(self.variant, first)
        compiled = self.variant.launch(self.programs, **given, **self._arguments)
        if compiled is None or interpreted() or torch.version.hip is not None:
            return
        described = []
        for name in self._boxes:
            which = self._pointers.index(name)
            fields = {field: value for field, value in vars(given[name]).items() if field != "base"}
            described.append((self._places[which], which, fields))
        # What is built in the background is there now, and loaded.
        built = compiled.result() if hasattr(compiled, "result") else compiled
        self._compiled[odd] = _Compiled(
            built.run, built.function, built.packed_metadata, first.get_device(), tuple(described)
        )
