"""What compute-sanitizer is on a GPU, for triton's interpreter: every access of every program is checked.

The interpreter reads and writes memory at the addresses that a kernel computes, and runs the programs of a grid one
after another: what lies next to a tensor is read without a word, and programs that race give one result every time.
Inside :func:`sanitize` the number of the argument that a pointer was made from rides in its upper 16 bits, as in
HWASan, so that every access can be held against that argument alone, wherever it points:

- *memcheck*: an active lane accesses elements of the view that was passed, no neighbours and no gaps between rows,
  and its address is a multiple of its size.
- *racecheck*: in one launch no program writes what another one reads or writes, but for atomics that meet only
  atomics; nor does one store write two values to one address. Aliased arguments count as the same memory. Programs
  that order each other through atomics are not understood, nor are the threads inside a program.
- *initcheck*: no active lane loads a NaN. Fresh memory must be filled with it and nothing else may hold one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Kind = Literal["load", "store", "atomic"]
Array = npt.NDArray[Any]

#: What an access of one kind may not meet at the same address if it came from another program.
CONFLICTS: dict[Kind, tuple[Kind, ...]] = {
    "load": ("store", "atomic"),
    "store": ("load", "store", "atomic"),
    "atomic": ("load", "store"),
}
#: Addresses of user space have 47 bits; the argument's number is above them.
ADDRESS_BITS = 48
ADDRESS = np.uint64(2**ADDRESS_BITS - 1)
#: In place of a program's number: more than one program.
SEVERAL = -1


class SanitizerError(AssertionError):
    """A kernel accessed memory as it must not."""


class Shadow:
    """Which program accessed each unit of a storage: 0 none, from 1 on the program, :data:`SEVERAL`."""

    def __init__(self, storage: torch.UntypedStorage, unit: int) -> None:
        self.start, self.nbytes, self.unit = storage.data_ptr(), storage.nbytes(), unit
        self.programs: dict[Kind, Array] = {kind: np.zeros(self.nbytes // unit, np.int32) for kind in CONFLICTS}

    def refine(self, unit: int) -> None:
        """Make units no larger than ``unit`` bytes."""
        if unit < self.unit:
            self.programs = {kind: np.repeat(seen, self.unit // unit) for kind, seen in self.programs.items()}
            self.unit = unit

    def units(self, offsets: Array, width: int) -> Array:
        """``[lanes, units]`` of accesses of ``width`` bytes."""
        self.refine(width)
        return (offsets // self.unit)[:, None] + np.arange(width // self.unit)


@dataclass(frozen=True)
class Argument:
    """A tensor that was passed to a launch.

    Args:
        name: the kernel's argument.
        tensor: the view that was passed.
        shadow: of its storage.
        addressable: which elements of the storage are elements of the view.
    """

    name: str
    tensor: torch.Tensor
    shadow: Shadow
    addressable: Array

    @property
    def start(self) -> int:
        """Address of the first element."""
        return self.shadow.start + int(self.tensor.storage_offset()) * self.tensor.element_size()

    def __str__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.name} ({dtype}, shape {tuple(self.tensor.shape)}, strides {self.tensor.stride()})"

    def outside(self, offsets: Array, width: int) -> Array:
        """Which lanes do not fall wholly inside elements of the view; ``offsets`` are bytes into the storage."""
        itemsize = self.tensor.element_size()
        outside: Array = np.zeros(offsets.shape, bool)
        for first in range(0, width, min(width, itemsize)):
            element = (offsets + first) // itemsize
            inside = (element >= 0) & (element < len(self.addressable))
            outside |= ~inside
            outside[inside] |= ~self.addressable[element[inside]]
        return outside


def _addressable(tensor: torch.Tensor) -> Array:
    """Which elements of the storage the view addresses."""
    elements = np.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), bool)
    if tensor.numel() > 0:
        strides = [stride * elements.itemsize for stride in tensor.stride()]
        np.lib.stride_tricks.as_strided(elements[tensor.storage_offset() :], tuple(tensor.shape), strides)[...] = True
    return elements


@dataclass
class Launch:
    """One launch of a kernel: its tensors, and who accessed what of them."""

    kernel: str
    arguments: list[Argument] = field(default_factory=list)
    #: Tags of the arguments by the identity of what the interpreter converts to pointers.
    tags: dict[int, int] = field(default_factory=dict)
    shadows: dict[int, Shadow] = field(default_factory=dict)
    fault: SanitizerError | None = None

    def add(self, name: str, value: Any) -> None:
        """Take in an argument of the launch, if it is a tensor or holds some."""
        if isinstance(value, tuple):
            for index, one in enumerate(value):
                self.add(f"{name}[{index}]", one)
        elif isinstance(value, interpreter.TensorDescriptor):
            self.add(name, value.base)
        elif hasattr(value, "data_ptr"):
            tensor: torch.Tensor = interpreter._unwrap_tensor(value)
            storage = tensor.untyped_storage()
            shadow = self.shadows.get(storage.data_ptr())
            if shadow is None:
                shadow = self.shadows[storage.data_ptr()] = Shadow(storage, tensor.element_size())
            shadow.refine(tensor.element_size())
            self.arguments.append(Argument(name, tensor, shadow, _addressable(tensor)))
            self.tags[id(value)] = len(self.arguments)

    def fail(self, check: str, what: str) -> None:
        """Report a fault; kept, for the interpreter raises an error of its own in its place."""
        program = interpreter.interpreter_builder.grid_idx
        self.fault = SanitizerError(f"{check}: {self.kernel}, program {program}: {what}")
        raise self.fault

    def fail_at(self, check: str, what: str, wrong: Array) -> None:
        """Report a fault at the first of the tagged addresses ``wrong``."""
        argument = self.arguments[(int(wrong[0]) >> ADDRESS_BITS) - 1]
        offset = (int(wrong[0]) & int(ADDRESS)) - argument.start
        self.fail(check, f"{what} at byte offset {offset} of {argument}, {len(wrong)} lanes")

    def check(self, kind: Kind, pointers: Array, mask: Array, width: int, values: Array | None = None) -> None:
        """Check an access and record it.

        Args:
            kind: what is done.
            pointers: tagged addresses.
            mask: of the active lanes.
            width: bytes of each lane.
            values: what a store writes.
        """
        active = np.broadcast_to(mask, pointers.shape)
        lanes = pointers[active]
        written = None if values is None else np.broadcast_to(values, pointers.shape)[active]
        tags = lanes >> np.uint64(ADDRESS_BITS)
        for tag in np.unique(tags).tolist():
            of_tag = tags == tag
            self._check_argument(kind, tag, lanes[of_tag], width, None if written is None else written[of_tag])

    def _check_argument(self, kind: Kind, tag: int, lanes: Array, width: int, values: Array | None) -> None:
        """Check the active lanes whose pointers were made from one argument."""
        access = f"{kind} of {width} bytes"
        if not 1 <= tag <= len(self.arguments):
            self.fail("memcheck", f"{access} through {int(lanes[0]):#x}, a pointer made from none of the arguments")
        argument = self.arguments[tag - 1]
        addresses = lanes & ADDRESS
        # From the storage, not the view: arguments that share memory share its shadow.
        offsets = addresses.astype(np.int64) - argument.shadow.start
        outside = argument.outside(offsets, width)
        if outside.any():
            self.fail_at("memcheck", f"{access} outside the elements,", lanes[outside])
        misaligned = addresses % np.uint64(width) != 0
        if misaligned.any():
            self.fail_at("memcheck", f"misaligned {access}", lanes[misaligned])
        if values is not None:
            twice = _written_twice(addresses, values)
            if twice.any():
                self.fail_at("racecheck", f"{access}, with different values of two lanes,", lanes[twice])

        shape = interpreter.interpreter_builder.grid_dim
        program = 1 + int(np.ravel_multi_index(interpreter.interpreter_builder.grid_idx, shape))
        units = argument.shadow.units(offsets, width)
        for other in CONFLICTS[kind]:
            seen = argument.shadow.programs[other][units]
            race = (seen != 0) & (seen != program)
            if race.any():
                number = int(seen[race][0])
                who = "several programs" if number == SEVERAL else f"program {_unravel(number - 1, shape)}"
                self.fail_at("racecheck", f"{access}, after the {other} of {who},", lanes[race.any(1)])
        mine = argument.shadow.programs[kind]
        seen = mine[units]
        mine[units] = np.where((seen == 0) | (seen == program), program, SEVERAL)


def _unravel(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(number, tuple(shape)))


def _written_twice(addresses: Array, values: Array) -> Array:
    """Which lanes of a store write another value than some other lane writes to the same address."""
    twice: Array = np.zeros(len(addresses), bool)
    if (addresses[1:] > addresses[:-1]).all():
        return twice
    order = np.argsort(addresses, kind="stable")
    # Compared bit for bit: NaN is the same as NaN, and 0.0 is not the same as -0.0.
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")[order]
    places = addresses[order]
    twice[order[1:]] = (places[1:] == places[:-1]) & (bits[1:] != bits[:-1])
    return twice


class Sanitizer:
    """The checks of :func:`sanitize`, and how often each kernel was launched under them."""

    def __init__(self, initcheck: bool) -> None:
        self.launches: Counter[str] = Counter()
        self._initcheck = initcheck
        self._launch = Launch("")
        self._memory: Any = interpreter._interpreter
        self._convert = interpreter._implicit_cvt
        self._call = interpreter.GridExecutor.__call__
        self._init_args = interpreter.GridExecutor._init_args_hst

    def call(self, executor: Any, *arguments: Any, **named: Any) -> Any:
        """A launch."""
        self._launch = launch = Launch(executor.fn.__name__)
        self.launches[launch.kernel] += 1
        try:
            return self._call(executor, *arguments, **named)
        except InterpreterError:
            if launch.fault is not None:
                raise launch.fault from None
            raise
        finally:
            self._launch = Launch("")

    def init_args(self, executor: Any, arguments: Any, named: Any) -> Any:
        """The arguments of a launch, in the memory that the interpreter uses."""
        on_host, named_on_host = self._init_args(executor, arguments, named)
        # There are more names than positions where arguments are passed by name.
        for name, value in [*zip(executor.arg_names, on_host, strict=False), *named_on_host.items()]:
            self._launch.add(name, value)
        return on_host, named_on_host

    def convert(self, value: Any) -> Any:
        """What an argument is inside the kernel: a pointer with a tag, if it is a tensor."""
        converted = self._convert(value)
        tag = self._launch.tags.get(id(value))
        if tag is not None:
            converted.handle.data = converted.handle.data + np.uint64(tag << ADDRESS_BITS)
        return converted

    def load(self, pointers: Array, mask: Any, other: Any, dtype: Any) -> Array:
        """A load, in place of the interpreter's own; the following functions likewise."""
        pointers, mask = np.asarray(pointers), np.asarray(mask)
        self._launch.check("load", pointers, mask, dtype.itemsize)
        loaded: Array = self._memory.load(pointers & ADDRESS, mask, other, dtype)
        if self._initcheck and np.issubdtype(dtype, np.floating):
            fresh = np.isnan(loaded) & mask
            if fresh.any():
                self._launch.fail_at("initcheck", "load of NaN", pointers[fresh])
        return loaded

    def store(self, pointers: Array, values: Array, mask: Any) -> None:
        pointers, values, mask = np.asarray(pointers), np.asarray(values), np.asarray(mask)
        self._launch.check("store", pointers, mask, values.itemsize, values)
        self._memory.store(pointers & ADDRESS, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Array, values: Array, mask: Any, semantic: Any) -> Any:
        self._launch.check("atomic", pointers, np.asarray(mask), values.itemsize)
        return self._memory.atomic_rmw(operation, pointers & ADDRESS, values, mask, semantic)

    def atomic_cas(self, pointers: Array, expected: Array, values: Array, semantic: Any) -> Any:
        self._launch.check("atomic", pointers, np.ones(1, bool), values.itemsize)
        return self._memory.atomic_cas(pointers & ADDRESS, expected, values, semantic)


@contextlib.contextmanager
def sanitize(*, initcheck: bool = False) -> Iterator[Sanitizer]:
    """Inside, a kernel that accesses memory as it must not raises :class:`SanitizerError`.

    Args:
        initcheck: whether loading a NaN is an error; fresh memory is to be filled with it.
    """
    sanitizer = Sanitizer(initcheck)

    def call(executor: Any, *arguments: Any, **named: Any) -> Any:
        return sanitizer.call(executor, *arguments, **named)

    def init_args(executor: Any, arguments: Any, named: Any) -> Any:
        return sanitizer.init_args(executor, arguments, named)

    with (
        # All that touches memory: block pointers and tensor descriptors are masked loads and stores by then.
        mock.patch.object(interpreter, "_interpreter", sanitizer),
        mock.patch.object(interpreter, "_implicit_cvt", sanitizer.convert),
        mock.patch.object(interpreter.GridExecutor, "__call__", call),
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", init_args),
    ):
        yield sanitizer
