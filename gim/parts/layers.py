"""What a layer consists of, as far as a memory plan must know it before the layer has run.

It decides what a plan runs apart, never what a rule acts on; what is wrong here costs memory, or is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn


def stream_at(inputs: Sequence[Any], named: Mapping[str, Any]) -> int | str | None:
    """Which of a layer's arguments its hidden states ``[B, T, .., W]`` are: a place, or a name of the layer's choice.

    Of several that could be, the first that a gradient is asked for; where none is, the first ``[B, T, W]``. None
    where there is none.
    """
    given: chain[tuple[int | str, Any]] = chain(enumerate(inputs), named.items())
    found = [(at, x) for at, x in given if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() >= 3]
    asked = (at for at, x in found if x.requires_grad)
    return next(asked, next((at for at, x in found if x.dim() == 3), None))


def stream(inputs: Sequence[Any], named: Mapping[str, Any]) -> torch.Tensor | None:
    """The hidden states ``[B, T, .., W]`` that a layer is called with, however; None where it is called with none."""
    at = stream_at(inputs, named)
    found: torch.Tensor | None = None if at is None else inputs[at] if isinstance(at, int) else named[at]
    return found


def inside(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """A module of that name and those in it, by name; other modules may hold them too, under another name."""
    return dict(module.named_modules(prefix=name))


def attentions(module: nn.Module) -> list[nn.Module]:
    """The attention modules of a module, itself included: those named so that contain no other."""
    named = {name: one for name, one in module.named_modules() if "Attention" in type(one).__name__}
    return [
        one
        for name, one in named.items()
        if not any(other != name and other.startswith(f"{name}." if name else "") for other in named)
    ]


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by type or name, or could be one by its parameters: a single vector ``weight``."""
    if any(True for _ in module.children()):
        return False
    if "norm" in type(module).__name__.lower():
        return True
    parameters = dict(module.named_parameters(recurse=False))
    return set(parameters) in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in parameters.values())
