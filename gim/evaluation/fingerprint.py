"""What a result depends on, in a form that two runs can be compared by."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from gim.evaluation.data import Kept
from gim.parts import anatomy

#: Packages whose versions a result depends on.
PACKAGES = ("gim-kernels", "torch", "transformers", "triton", "captum", "scikit-learn")
#: Numbers of each weight whose places count too.
SAMPLED = 4096
#: Bytes of a weight that are summed at once.
SUMMED = 2**20


def versions() -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def name_of(model: nn.Module) -> str:
    """A model's class and the last part of where it came from: a path on somebody's disk is nobody's business."""
    path = str(getattr(anatomy.of(model).config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    return type(model).__name__ + (f" ({path})" if path else "")


def of_model(model: nn.Module) -> str:
    """A digest of a model's class, config and weights.

    Of each weight and buffer: name, shape, dtype, the sum of all of its bytes, and some thousand of them in their
    order. So a change of any one number is seen.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor):  # a module's own extra state
            digest.update(f"{name} {weight!r} ".encode())
            continue
        for part in _held(weight.detach()):
            digest.update(f"{name} {tuple(part.shape)} {part.dtype} ".encode())
            content = part.contiguous().view(-1).view(torch.uint8) if part.numel() else part.new_empty(0)
            step = max(1, len(content) // SAMPLED)
            # A sum of whole numbers does not depend on the order in which they are added. By parts: torch makes eight
            # bytes of each that it adds.
            total = sum(int(some.sum(dtype=torch.int64)) for some in content.split(SUMMED))
            digest.update(f"{total} {content[::step].tolist()}".encode())
    return digest.hexdigest()[:16]


def _held(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a weight is made of: itself, or what a quantised one holds."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        yield weight
        return
    for name in flatten()[0]:
        yield from _held(getattr(weight, name))


def of_function(function: Callable[..., Any]) -> str:
    """What tells a function from another of its name: its place, its code and the plain values that it holds.

    Those are its defaults, what it closes over and what ``functools.partial`` binds: numbers, texts, tuples and
    functions of such. What else it reads, such as a global or an attribute, is not seen.
    """
    where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return f"{where} {hashlib.sha256(repr(_held_by(function, ())).encode()).hexdigest()[:16]}"


def _held_by(value: Any, inside: tuple[int, ...]) -> Any:
    """What of a value is plain, at any depth; of anything else its type alone."""
    if id(value) in inside:  # a function that closes over itself
        return None
    inside = (*inside, id(value))
    if isinstance(value, functools.partial):
        return _held_by((value.func, value.args, tuple(sorted(value.keywords.items()))), inside)
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, _held_by(value.co_consts, inside)
    if isinstance(value, tuple | frozenset):
        several = value if isinstance(value, tuple) else sorted(value, key=repr)
        return [_held_by(one, inside) for one in several]
    if isinstance(value, str | bytes | int | float | complex | None):
        return value
    code = getattr(value, "__code__", None)
    if code is None:
        return type(value).__qualname__
    named = tuple(sorted((value.__kwdefaults__ or {}).items()))
    cells = []
    for cell in value.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return _held_by((code, value.__defaults__, named, tuple(cells)), inside)


def of_example(kept: Kept) -> str:
    """A digest of an example's name, ids, target and foil."""
    content: list[Any] = [kept.example.id, kept.ids.tolist(), kept.target, kept.foil]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
