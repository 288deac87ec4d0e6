"""Any other module that has ``get_input_embeddings()``, bare or inside a wrapper."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

#: Names of the arguments that arrive where they are meant to, if they are given to the outermost module.
Taken = frozenset[str]
#: What a model may be called with here.
ARGUMENTS = ("input_ids", "attention_mask", "position_ids")


def is_one(modules: Mapping[str, nn.Module]) -> bool:
    """Any module is one."""
    return True


def written(module: nn.Module) -> nn.Module:
    """A module as it was written, where ``torch.compile`` has given another that stands for it."""
    return written(module._orig_mod) if isinstance(module, OptimizedModule) else module


def parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward, as its class declares it: a patch may hide them on the instance."""
    return inspect.signature(type(module).forward).parameters


def name_of(module: Any, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a module among others; None where it is none of them."""
    return next((name for name, one in modules.items() if one is module), None)


def embedding(modules: Mapping[str, nn.Module]) -> str | None:
    """The name of what the outermost module that knows its input embeddings says they are."""
    for module in modules.values():
        get = getattr(module, "get_input_embeddings", None)
        if get is None:
            continue
        try:
            found = name_of(get(), modules)
        except (NotImplementedError, AttributeError):  # transformers' answer of a model that has none
            continue
        if found is not None:
            return found
    return None


def taken(modules: Mapping[str, nn.Module], embedding_name: str) -> Taken:
    """The arguments that reach a module that names them, from the outermost inwards to the embedding.

    A module that does not name an argument hands it on where its forward takes any.
    """
    parts = embedding_name.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts))]
    found = set()
    for argument in ARGUMENTS:
        for name in names:
            known = parameters(modules[name])
            if argument in known:
                found.add(argument)
            if argument in known or not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values()):
                break
    return frozenset(found)


def arguments(
    taken: Taken,
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """What a model is called with for ids ``[B, T]``."""
    asked = parameters(model).get("attention_mask")
    if mask is None and asked is not None and asked.default is inspect.Parameter.empty:
        mask = torch.ones_like(ids)  # a forward that cannot do without one
    given = {"attention_mask": None if mask is None else mask.to(torch.int64), "position_ids": position_ids}
    named = {name: value for name, value in given.items() if value is not None}
    for name in named:
        if name not in taken:
            raise ValueError(f"{name} cannot be given to {type(model).__name__}, whose forward takes none")
    if "input_ids" in taken:
        return (), {"input_ids": ids, **named}
    return (ids,), named
