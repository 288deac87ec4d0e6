"""Norms written out in a module of their own, run by the kernels once the mode has seen what the module does.

It is a cache and no way in: a module's first call runs its own code, where :mod:`gim.intercept.products` finds the norm
and applies the rule. What that code called is noted, and where it is the equation of an RMS norm or a layer norm, the
kernel takes its place from then on: it keeps one number for each row. Nobody's module is ever run for it.

That the equation gives the same on a few numbers proves it of all numbers only where the code cannot do otherwise on
others. So the functions that may have been called are few, and none of them clips, chooses or compares; and all that
the code may have asked of a tensor is what the cache knows a norm by.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import gim_kernels
from gim.intercept import checkpoints, products
from gim.intercept.frames import Frame, Paused
from gim.intercept.gates import Gate
from gim.parts.adapters import accelerate
from gim_kernels import engines, reference, told
from gim_kernels.types import Engine

#: Whether kernels take the place of norms that are written out; False runs every module's own code.
ENABLED = True
#: Rows of numbers that an equation and the noted calls are compared on.
_ROWS = 4
#: Roundings by which they may differ, in units in the last place.
_ULPS = 8
#: All that a norm is made of. Every one is smooth in its numbers, makes new memory, and knows no place along an axis.
_ARITHMETIC = (
    "add sub subtract rsub mul multiply div divide true_divide neg negative pow square sqrt rsqrt reciprocal mean sum "
    "var std __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __neg__ __pow__"
)
_EQUATION = frozenset(
    getattr(place, name) for place in (torch, torch.Tensor) for name in _ARITHMETIC.split() if hasattr(place, name)
) | {getattr(torch.Tensor, name) for name in ("to", "type", "type_as", "float", "double", "half", "bfloat16")}
#: What would make a step of another kind of them.
_OTHERWISE = frozenset({"out", "rounding_mode"})
#: What a tensor may be asked that is no tensor: what a norm is known by.
_ASKED = frozenset(
    {
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.is_floating_point,
        torch.is_floating_point,
    }
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_PRODUCTS = products.PRODUCTS | products.QUOTIENTS | products.IN_PLACE.keys()
_MODULE = frozenset(nn.Module().__dict__) | {"forward"} | accelerate.KEPT


@dataclass(frozen=True)
class Norm:
    """What a module computes.

    Args:
        kind: ``"rms_norm"`` or ``"layer_norm"``.
        eps: its epsilon.
        weight, bias: names of the parameters; None for none.
        weight_offset: what is added to the weight.
    """

    kind: str
    eps: float
    weight: str | None = None
    bias: str | None = None
    weight_offset: float = 0.0

    def describe(self) -> str:
        """In words, for the report."""
        return f"{self.kind}{' with weight 1 + w' if self.weight_offset else ''}, written out"

    def apply(
        self, held: Mapping[Any, torch.Tensor | None], x: torch.Tensor, *, frozen: bool, by: Any, engine: Engine
    ) -> torch.Tensor:
        """The norm of ``x`` ``[.., D]``, by the operators of ``by``; ``held`` are parameters by their names."""
        weight, bias = held.get(self.weight), held.get(self.bias)
        # A weight of several rows is a vector for each head, which is applied outside the kernel.
        rows, inner = (None, weight) if weight is None or weight.dim() == 1 else (weight + self.weight_offset, None)
        if self.kind == "rms_norm":
            y: torch.Tensor = by.rms_norm(
                x, inner, self.eps, weight_offset=self.weight_offset, frozen=frozen, engine=engine
            )
        else:
            shifted = inner if inner is None or not self.weight_offset else inner + self.weight_offset
            y = by.layer_norm(x, shifted, bias, self.eps, frozen=frozen, engine=engine)
        return y if rows is None else y * rows

    def by_kernels(self, frame: Frame, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        """The norm of ``x`` in a module, by the rules of its session, and the engine that ran."""
        session, held = frame.session, {**frame.module._parameters, **frame.module._buffers}
        with Paused(), told.listening() as ran:
            y = self.apply(held, x, frozen=session.rules.freeze_norm, by=gim_kernels, engine=session.engine)
        return y, str(ran)


class Trace:
    """The functions of torch that one call of a module made, in order; it keeps no tensor alive.

    Args:
        module: whose call.
        x: what it was called with.
    """

    def __init__(self, module: nn.Module, x: torch.Tensor) -> None:
        self._steps: list[tuple[Callable[..., Any], Any, Any, int]] = []
        #: By ``id``: an entry goes with its tensor, so no id is found that another tensor had.
        self._slots: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._names = {id(one): name for name, one in (*module.named_parameters(), *module.named_buffers())}
        self._count = 0
        self.readable = True
        self.multiplies = False
        self.constants: set[float] = set()
        self.used: list[str] = []
        self._put(x)

    def _put(self, x: torch.Tensor) -> int:
        slot, number, slots = self._count, id(x), self._slots
        self._count += 1
        slots[number] = (weakref.ref(x, lambda _: slots.pop(number, None)), slot)
        return slot

    def _place(self, one: Any) -> Any:
        """A tensor as the number of the step that made it, or the name of the parameter that it is."""
        if isinstance(one, float):
            self.constants.add(one)
        if not isinstance(one, torch.Tensor):
            return one
        name = self._names.get(id(one))
        if name is not None:
            if name not in self.used:
                self.used.append(name)
            return _Place(name)
        slot = self._slots.get(id(one))
        if slot is None:
            self.readable = False
            return None
        return _Place(slot[1])

    def add(self, func: Callable[..., Any], args: Any, named: Any, out: Any) -> None:
        """Note one call."""
        self.multiplies |= func in _PRODUCTS
        if not self.readable:
            return
        if isinstance(out, torch.Tensor):
            if func not in _EQUATION or named.keys() & _OTHERWISE or not out.is_floating_point():
                self.readable = False
                return
            places = tree_map(self._place, (args, named))
            self._steps.append((func, *places, self._put(out)))
        elif func not in _ASKED:
            self.readable = False  # several tensors, a number read from one, or how many there are

    def replayed(self, x: torch.Tensor, held: dict[str, torch.Tensor], out: torch.Tensor) -> torch.Tensor | None:
        """What the same calls give for another ``x`` and other parameters, where ``out`` came from them."""
        last = self._slots.get(id(out))
        if last is None:
            return None
        made: dict[int | str, torch.Tensor] = {0: x.clone()}  # which a call may overwrite
        made.update(held)

        def found(one: Any) -> Any:
            return made[one.of] if isinstance(one, _Place) else one

        for func, args, named, slot in self._steps:
            flat, spec = tree_flatten((args, named))
            inputs, others = tree_unflatten([found(one) for one in flat], spec)
            made[slot] = func(*inputs, **others)
        return made[last[1]]


@dataclass(frozen=True)
class _Place:
    of: int | str


#: By what decides which code a module runs: the norm that it is, or None.
_known: dict[Any, Norm | None] = {}
#: Classes of which a module ran and was no norm; nothing is lost by asking none of them again.
_other: set[type] = set()


def run_of(gate: Gate, frame: Frame, x: Any) -> Callable[..., Any]:
    """What runs for the ``forward`` of a module that has no other in it, with one argument: the kernels where it is
    known to be a norm, else its own, which is looked at where it may be one."""
    if type(gate.module) in _other:
        gate.leaf = False
        return gate.inner
    with Paused():  # what is asked here of tensors is no code of the module's
        # Where no gradient flows through a norm, none is seen in its code, so none is known there from before either.
        lives = isinstance(x, torch.Tensor) and (x.requires_grad or not torch.is_grad_enabled())
        key = _key(gate, x) if lives and not _others_modes() else None
    if torch.is_grad_enabled():
        checkpoints.follow(frame.session, frame)
        if key is not None and key not in _known:
            return functools.partial(_learn, key, gate, frame)
    norm = _known.get(key)
    return gate.inner if norm is None else functools.partial(_run, norm, frame)


def _run(norm: Norm, frame: Frame, x: torch.Tensor) -> torch.Tensor:
    """A norm that is known, by the kernels."""
    out, engine = norm.by_kernels(frame, x)
    frame.session.fire("norm", norm.describe(), engine)
    return out


def _learn(key: Any, gate: Gate, frame: Frame, x: torch.Tensor) -> Any:
    """What a module's own code gives, which is looked at; by the kernels from this call on, where it is a norm."""
    module, session = gate.module, frame.session
    frame.trace = trace = Trace(module, x)
    before, saved = session.fired, _Saved()
    with saved.waiting:
        out = gate.inner(x)
    frame.trace = norm = None
    row = session.last
    if row is not None and session.fired == before + 1 and row.part == "norm" and row.engine == "torch":
        norm = _recognise(trace, module, x, out)
        if norm is not None and not _gives(norm, frame, x, out):
            norm = None
        _known[key] = norm
    elif session.fired > before or not trace.multiplies:
        _other.add(type(module))  # else a hook's code may have run, in which nothing is seen
    saved.settle(kept=norm is None)
    if norm is not None and row is not None:
        session.rename(row, norm.describe())
        out, row.engine = norm.by_kernels(frame, x)
    return out


def _others_modes() -> bool:
    """Whether somebody's own function mode is on, which may change what the functions of torch do."""
    held = [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]
    return any(not isinstance(mode, DeviceContext) and not hasattr(mode, "session") for mode in held)


class _Saved:
    """What is saved for a backward inside waits until it is known whether it is needed.

    A checkpoint counts what is saved, and its second run, by the kernel, would save something else.
    """

    def __init__(self) -> None:
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._cells: list[list[Any]] = []
        self._settled = False
        self.waiting = nullcontext() if self._hooks is None else saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: torch.Tensor) -> list[Any]:
        self._cells.append([x])
        return self._cells[-1]

    def _unpack(self, cell: list[Any]) -> Any:
        return self._hooks[1](cell[0]) if self._settled else cell[0]

    def settle(self, *, kept: bool) -> None:
        """Hand what was saved to the hooks around, or drop it."""
        self._settled = True
        for cell in self._cells:
            cell[0] = self._hooks[0](cell[0]) if kept else None
        self._cells.clear()


def _key(gate: Gate, x: torch.Tensor) -> Any:
    """What decides which code a module runs on ``x``; None where that cannot be told."""
    module = gate.module
    if not ENABLED or not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return None
    if gate.own is not None and not accelerate.only_moves(module):
        return None
    device, shape = x.device, x.shape
    if len(shape) < 2 or engines.autocasts(device.type):
        return None
    own = [(name, value) for name, value in module.__dict__.items() if name not in _MODULE]
    for _, value in own:
        sizes = isinstance(value, tuple) and all(isinstance(one, int) for one in value)
        if not sizes and not isinstance(value, _PLAIN):
            return None
    parameters = []
    for kept in (module._parameters, module._buffers):
        for name, one in kept.items():
            if one is not None:
                if one.device != device:
                    return None
                parameters.append((name, one.shape, one.dtype))
    cls: Any = type(module)
    code = cls.forward
    said = _Read(cls, code).said()
    if said is None:
        return None
    return cls, code, (*own,), said, (*parameters,), device.type, x.dtype, len(shape), shape[-1], module.training


@functools.lru_cache(maxsize=1024)
class _Read:
    """What a module's code may read besides its own, of its classes and of the files of what it calls, and what that
    means.

    Args:
        cls: the module's.
        code: its ``forward``, which may be another one tomorrow.
    """

    def __init__(self, cls: type, code: Callable[..., Any]) -> None:
        classes = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
        waiting = [code, *(one for base in classes for one in vars(base).values())]
        places: dict[tuple[int, str], Callable[..., Any]] = {}
        seen: set[int] = set()
        while waiting:
            function = waiting.pop()
            ours = isinstance(function, FunctionType) and not function.__module__.startswith("torch.")
            if not ours or id(function) in seen:
                continue
            seen.add(id(function))
            around = function.__globals__
            for name in function.__code__.co_names:
                places[id(around), name] = around.get
                waiting.append(around.get(name))
            for cell in function.__closure__ or ():
                with suppress(ValueError):  # an empty one
                    waiting.append(cell.cell_contents)
        #: All names that the code mentions, so what it may ask of what it reads.
        self._names = dict.fromkeys(name for _, name in places)
        self._asked = [(get, name) for (_, name), get in places.items()]
        self._asked += [(vars(base).get, name) for base in classes for name in self._names]
        #: What was found last, held so that it is the same as long as it is the same object, and in words.
        self._last: tuple[list[Any], Any] = [], ()
        self._changes = True  # whether any of them may hold something else and be the same

    def said(self) -> Any:
        """What tells the meanings of now from others; None where the code asks what nobody sees change."""
        found = [get(name) for get, name in self._asked]
        before, said = self._last
        if self._changes or not all(map(operator.is_, found, before)):
            said = tuple([_words(one, self._names) for one in found])
            self._changes = any(isinstance(one, tuple) for one in said)
            said = None if _UNTOLD in said else said
            self._last = found, said
        return said


def _words(value: Any, names: Iterable[str]) -> Any:
    """What tells a thing that code may read from others, and from what it held before: a tuple where it may change.

    Args:
        value: the thing.
        names: what the code may ask of it, where it is no container.
    """
    if isinstance(value, _PLAIN):
        return value
    if _has_a_state(value):
        return _UNTOLD
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        inside = enumerate(value)
    elif isinstance(value, FunctionType | BuiltinFunctionType | functools.partial) or _is_librarys(value):
        return id(value)
    else:
        own = getattr(value, "__dict__", {})
        inside = [(name, own[name]) for name in names if name in own]
    return id(value), *((name, one if isinstance(one, _PLAIN) else id(one)) for name, one in inside)


#: Stands for what may answer otherwise the next time.
_UNTOLD = object()
#: Of Python's own modules, those whose functions compute no number, or the same ones from the same.
_SAME = frozenset(
    (
        "abc", "builtins", "cmath", "collections", "contextlib", "copy", "dataclasses", "enum", "functools", "inspect",
        "itertools", "logging", "math", "numbers", "operator", "re", "types", "typing", "warnings",
    )
)  # fmt: skip


def _has_a_state(value: Any) -> bool:
    """Whether something is a module of Python's, or a function of one in C, that answers by more than what it is asked:
    the environment, the clock, what is random."""
    if isinstance(value, ModuleType):
        home = value.__name__
    elif isinstance(value, BuiltinFunctionType):
        home = value.__module__ or type(value.__self__).__module__
    else:
        return False
    root = home.partition(".")[0].lstrip("_")
    return root not in _SAME and (root in sys.stdlib_module_names or f"_{root}" in sys.stdlib_module_names)


def _is_librarys(value: Any) -> bool:
    """Whether a module or class is Python's or torch's, which nobody changes."""
    if not isinstance(value, ModuleType | type):
        return False
    home = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return home.partition(".")[0] in {"torch", *sys.stdlib_module_names}


def _recognise(trace: Trace, module: nn.Module, x: torch.Tensor, out: Any) -> Norm | None:
    """The norm whose equation gives what the noted calls give, on numbers of our own.

    Three sets of rows are used: of unit size with a mean, which tell the kinds and the weight's offset apart; as small
    as the square root of epsilon, whose outputs depend on it; and large, in which arithmetic that bends far out shows.
    No axis is of size 1, so a statistic over another axis shows too. Parameters are random.
    """
    if not trace.readable or not isinstance(out, torch.Tensor) or out.dtype != x.dtype or len(trace.used) > 2:
        return None
    generator = torch.Generator().manual_seed(0)
    held = {}
    for name in trace.used:
        one = getattr(module, name)
        held[name] = torch.randn(one.shape, generator=generator, device="cpu").to(one.dtype)
    heads = next((one.shape[0] for one in held.values() if one.dim() == 2 and one.shape[0] > 1), _ROWS)
    shape = (*[2] * (x.dim() - 2), heads, x.shape[-1])
    rows = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") + 1.0
    large = min(1e6, torch.finfo(x.dtype).max / 64)
    epsilons = sorted({value for value in trace.constants if 0 <= value < 1e-1}) or [0.0]
    with torch.no_grad(), torch._C.DisableTorchFunction():
        for eps in epsilons:
            probes = [(rows * size).to(x.dtype) for size in (1.0, max(eps, 1e-6) ** 0.5, large)]
            try:
                outputs = [trace.replayed(probe, held, out) for probe in probes]
            except (RuntimeError, TypeError, ValueError, IndexError):  # calls that fit no other shape or place
                return None
            for norm in _candidates(eps, trace.used):
                if all(_equal(y, norm, held, probe) for probe, y in zip(probes, outputs, strict=True)):
                    return norm
    return None


def _candidates(eps: float, used: list[str]) -> list[Norm]:
    kinds = ("layer_norm",) if len(used) > 1 else ("rms_norm", "layer_norm")
    offsets = (0.0, 1.0) if used else (0.0,)
    named = [dict(zip(("weight", "bias"), names, strict=False)) for names in itertools.permutations(used)]
    return [Norm(kind, eps, weight_offset=by, **each) for kind in kinds for each in named for by in offsets]


def _equal(output: torch.Tensor | None, norm: Norm, held: dict[str, torch.Tensor], x: torch.Tensor) -> bool:
    """Whether an output is the equation's within a few roundings of its dtype, float32 at best."""
    if output is None or output.shape != x.shape or output.dtype != x.dtype:
        return False
    wide = {name: one.double() for name, one in held.items()}
    want = norm.apply(wide, x.double(), frozen=False, by=reference, engine="reference")
    return _close(output.double(), want, x.dtype)


def _close(y: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether each row is another within a few roundings of a dtype, float32 at best."""
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    gap, size = (y - want).abs().amax(-1), want.abs().amax(-1)
    return bool((gap.float() <= _ULPS * eps * size.float()).all())


def _gives(norm: Norm, frame: Frame, x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the kernel gives what the module's own code has just given."""
    if x.is_meta:
        return True
    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        return _close(norm.by_kernels(frame, x)[0], out, x.dtype)
