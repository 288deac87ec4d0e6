"""One file for each front end: how its models are told, called, and where their ids become embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import nn

from gim.parts.adapters import hugging_face, torch_modules, transformer_lens

#: A new front end is a new file and a name here.
FRONT_ENDS: tuple[ModuleType, ...] = (transformer_lens, hugging_face, torch_modules)


def of(modules: Mapping[str, nn.Module]) -> ModuleType:
    """The first front end that knows a model by its modules, the model itself first under the empty name."""
    return next(front for front in FRONT_ENDS if front.is_one(modules))
