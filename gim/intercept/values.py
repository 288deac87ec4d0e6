"""What the watch keeps of a value: what it was computed from, and how; no number and no tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Tensors = list[torch.Tensor]
_numbers = itertools.count(1)


class Value:
    """What is known of one value; its attributes are what it does not say itself."""

    dep = False  # a gradient of the input flows through it
    act = False  # something nonlinear happened, number by number, since the last linear map
    top = ""  # the operator it came from
    stat: tuple[int, int, str, int] | None = None  # (value, its source, how, places) where it is a reduction
    parts: Any = None  # what was joined to it
    scores = False  # from a product of two values that depend on the input
    aside = False  # scores whose last axis is neither queries nor keys
    # Of a constant times what depends on the input: whether its last axis are the places of that; else None.
    keys: bool | None = None
    depth = 0  # how often tokens were mixed since the input, on the longest way
    mixed = False  # tokens were mixed by attention since the last linear map
    soft = False  # past a softmax or a division into shares
    random = blank = written = False
    cut = 0  # CUT: computed without gradients from what has one; ROUNDED: and made integers since
    map: Any = None  # what to say of the linear map that it came from without gradients
    hidden: tuple[Any, ...] = ()  # what would be said of it, had it a gradient

    def __init__(self, **known: Any) -> None:
        self.id = next(_numbers)
        self.source: int = self.id  # the value of which it is a function, number by number
        self.__dict__.update(known)

    def like(self, **changes: Any) -> Value:
        """The same with a number of its own, and what is changed."""
        new = object.__new__(Value)
        new.__dict__.update(self.__dict__, id=next(_numbers), written=False)
        new.__dict__.update(changes)
        return new


CUT, ROUNDED = 1, 2
#: How deep in lists, dicts and objects the tensors of a forward's arguments are looked for.
ARGUMENTS_DEEP = 6
CONSTANT = Value()
BLANK = Value(blank=True)
FROM_PYTHON = Value(top="lift_fresh")  # numbers of Python's or of another library's

MADE = {"blank": BLANK, "fresh": CONSTANT, "from python": FROM_PYTHON}
#: Operators that read no number of their arguments.
UNREAD = {"same", "piece", *MADE}


def flatten(given: Iterable[Any], into: Tensors) -> None:
    """The tensors among arguments or results, and in their lists."""
    for one in given:
        if isinstance(one, torch.Tensor):
            into.append(one)
        elif isinstance(one, (list, tuple)):
            flatten(one, into)


def collect(thing: Any, into: Tensors, seen: set[int], depth: int) -> None:
    """The tensors that something holds: in lists, dicts and objects, but in no module."""
    if isinstance(thing, str | int | float | type | nn.Module) or thing is None or id(thing) in seen:
        return
    if isinstance(thing, torch.Tensor):
        into.append(thing)
    if depth and not callable(thing) and type(thing).__module__ != "torch":
        seen.add(id(thing))
        inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else None
        for one in list(getattr(thing, "__dict__", {}).values() if inner is None else inner):
            collect(one, into, seen, depth - 1)


#: Tensors without code of their own.
PLAIN = (torch.Tensor, nn.Parameter)


def inside(tensor: Any) -> Tensors:
    """The tensors that a tensor is a wrapper of, as a distributed or a quantised one is."""
    if type(tensor) in PLAIN or not is_traceable_wrapper_subclass(tensor):
        return []
    held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [one for one in held if isinstance(one, torch.Tensor)]


def is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def spans(tensor: torch.Tensor) -> int:
    """How many different places a tensor has: an axis that only repeats counts as one."""
    return prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def join(values: list[Value], act: bool = False, parts: list[Value] | None = None) -> Value:
    """Of several values together: a function of each and of no one alone."""
    flags = {name: any(getattr(v, name) for v in values) for name in ("dep", "scores", "keys", "mixed", "random")}
    return Value(act=act or any(v.act for v in values), parts=parts, **flags)
