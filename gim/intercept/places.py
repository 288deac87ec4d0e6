"""Where the values of a watched forward lie: each by the storage it is in, and its place there.

No tensor is kept alive: a storage is known by its address, which a weak reference keeps from being used twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gim.intercept.values import ARGUMENTS_DEEP, CONSTANT, PLAIN, Tensors, Value, collect, inside, join

_Window = tuple[Any, torch.Size, tuple[int, ...]]


def _window(tensor: torch.Tensor) -> _Window:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


class Places:
    """What lies in the storages of one forward.

    Args:
        modules: of the model, by name; its parameters, buffers and what else it holds are constants.
        given: the arguments of the forward, whose tensors are inputs.
    """

    def __init__(self, modules: Mapping[str, nn.Module], given: Iterable[Any]) -> None:
        self._storages: dict[int, dict[_Window, Value] | None] = {}  # None: all of it is constant
        self._references: list[Any] = []
        self._unstored: dict[int, tuple[weakref.ref[torch.Tensor], dict[_Window, Value]]] = {}
        held: Tensors = []
        seen: set[int] = set()
        for module in modules.values():
            held += [one for kept in (module._parameters, module._buffers) for one in kept.values() if one is not None]
            collect({k: v for k, v in vars(module).items() if k[:1] != "_"}, held, seen, 4)
        for tensor in held:
            collect(vars(tensor), held, seen, 3)  # what a quantised weight keeps beside itself
        self._held = [weakref.ref(tensor) for tensor in held]
        inputs: Tensors = []
        collect(list(given), inputs, set(), ARGUMENTS_DEEP)
        self._inputs = [weakref.ref(tensor) for tensor in inputs]

    def begin(self) -> None:
        """Enter what is known before anything runs."""
        for reference in self._held:
            tensor = reference()
            if tensor is not None:
                self.at(tensor)
                self._storages[self._address(tensor)] = None
        for given in self.inputs():
            if self.at(given) is not None:
                self.put(given, Value(dep=True), False)

    def end(self) -> None:
        """Forget everything."""
        for reference in self._references:
            torch.UntypedStorage._free_weak_ref(reference)
        for kept in (self._references, self._storages, self._unstored):
            kept.clear()

    def inputs(self) -> Tensors:
        """The tensors of the arguments that are still there."""
        return [tensor for reference in self._inputs if (tensor := reference()) is not None]

    def _address(self, tensor: torch.Tensor) -> int:
        try:
            return tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return -id(tensor)  # a tensor without a storage is known by itself

    def where(self, tensor: torch.Tensor) -> Any:
        """What tells the place of a tensor from others, and what it holds from what it held before."""
        self.at(tensor)  # so that its address is not used again
        return self._address(tensor), _window(tensor), 0 if tensor.is_inference() else tensor._version

    def at(self, tensor: torch.Tensor) -> dict[_Window, Value] | None:
        """What is known of each window of a tensor's storage; None where all of it is constant."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return self._without_storage(tensor)
        address = storage._cdata
        try:
            return self._storages[address]
        except KeyError:
            self._references.append(storage._weak_ref())
            windows = self._storages[address] = {}
            return windows

    def _without_storage(self, tensor: torch.Tensor) -> dict[_Window, Value] | None:
        number = -id(tensor)
        if number in self._storages:
            return None
        entry = self._unstored.get(number)
        if entry is None or entry[0]() is not tensor:
            entry = self._unstored[number] = (weakref.ref(tensor), {})
        return entry[1]

    def holds_values(self, tensor: torch.Tensor) -> bool:
        """Whether something is known of a tensor's storage, and it is no constant."""
        return bool(self._storages.get(self._address(tensor)))

    def of(self, tensor: torch.Tensor) -> Value | None:
        """What is known of a tensor; None where no operator wrote it."""
        windows = self.at(tensor)
        if windows is None:
            return CONSTANT
        value = windows.get(_window(tensor))
        if value is None and windows:  # written piece by piece, or seen through a window made elsewhere
            value = windows[_window(tensor)] = join(list(windows.values()))
        elif value is not None and value.top == "lift_fresh" and tensor.grad_fn is not None:
            return None
        return value

    def know(self, tensor: torch.Tensor, value: Value) -> None:
        """Say what a tensor holds that no operator wrote."""
        windows = self.at(tensor)
        if windows is not None:
            windows[_window(tensor)] = value

    def put(self, tensor: torch.Tensor, value: Value, written: bool) -> None:
        """Say what a tensor holds now; ``written`` where an operator wrote into one that was there."""
        windows = self.at(tensor)
        if windows is None:
            if not value.dep:
                return
            self._storages[self._address(tensor)] = windows = {}  # what held a constant holds one no more
        if written:
            value, whole = value.like(written=True), tensor.nbytes >= tensor.untyped_storage().nbytes()
            for key in [key for key, old in windows.items() if whole or not old.written]:
                del windows[key]  # what was known of the storage before
        windows[_window(tensor)] = value
        if type(tensor) not in PLAIN:
            for one in inside(tensor):
                self.put(one, value, False)
