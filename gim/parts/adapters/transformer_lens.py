"""Models of TransformerLens, told without importing it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gim.parts.adapters import torch_modules

PACKAGE = "transformer_lens"


def is_one(modules: Mapping[str, nn.Module]) -> bool:
    """Whether a model, the first of its modules, is TransformerLens's."""
    return is_model(modules[""])


def is_model(model: object) -> bool:
    """Whether an object is a model of TransformerLens."""
    return any(cls.__module__.split(".")[0] == PACKAGE for cls in type(model).__mro__)


def embedding(modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the module that turns ids into embeddings."""
    return torch_modules.name_of(getattr(modules[""], "embed", None), modules)


def arguments(
    taken: torch_modules.Taken,
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """What a model is called with for ids ``[B, T]``."""
    if position_ids is not None:
        raise ValueError(f"position_ids cannot be given to {type(model).__name__}, whose forward takes none")
    named: dict[str, Any] = {"input": ids, "return_type": "logits"}
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in torch_modules.parameters(model).values()):
        named["use_cache"] = False  # a bridge hands it to the Hugging Face model that it wraps
    if mask is not None:
        named["attention_mask"] = mask.to(torch.int64)
    return (), named
