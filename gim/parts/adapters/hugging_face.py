"""Hugging Face models, bare or inside a wrapper such as PEFT's, ``torch.compile``'s or one of the user's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from gim.parts.adapters import torch_modules

#: What a model is called with, whatever its config or its wrapper says: a cache would grow when a layer runs again,
#: and what else it can put out is not looked at.
WITHOUT_CACHE = {"use_cache": False}
LOGITS_ONLY = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}

embedding = torch_modules.embedding
arguments = torch_modules.arguments


def is_one(modules: Mapping[str, nn.Module]) -> bool:
    """Whether a Hugging Face model is among a model's modules."""
    return bool(models(modules))


def models(modules: Mapping[str, nn.Module]) -> dict[str, PreTrainedModel]:
    """The Hugging Face models among modules, by name; one may be a part of another."""
    return {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}


def inside(modules: Mapping[str, nn.Module], through: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the Hugging Face models that the modules named in ``through`` are parts of, outermost first."""
    return tuple(
        name
        for name in models(modules)
        if any(one == name or one.startswith(f"{name}." if name else "") for one in through)
    )


def settings(module: nn.Module) -> dict[str, Any]:
    """What one of these models is called with besides what its caller gives it."""
    known = torch_modules.parameters(module)
    config = module.config
    found = {name: value for name, value in WITHOUT_CACHE.items() if name in known}
    # Only where the config says otherwise: most models hand on what they do not know to every layer.
    found.update({name: value for name, value in LOGITS_ONLY.items() if getattr(config, name, value) != value})
    return found


def refusal(config: Any) -> str | None:
    """Why a model of a config cannot be called with ids alone; None where it can."""
    if getattr(config, "is_encoder_decoder", False):
        return (
            "is an encoder-decoder, which embeds the ids of two texts: differentiate inside gim.GIM, with "
            "decoder_input_ids of your own"
        )
    return None


def labels(module: nn.Module) -> int:
    """How many classes the config of one of these models says that there are; 0 where it says nothing."""
    return int(getattr(module.config, "num_labels", None) or 0)


def as_before(given: Any) -> Any:
    """A cache as it is now, whatever is added to it later; anything else itself."""
    if not isinstance(given, Cache):
        return given
    kept = copy.copy(given)
    for name, value in vars(given).items():
        if isinstance(value, Cache):
            setattr(kept, name, as_before(value))
    if isinstance(getattr(given, "layers", None), list):
        kept.layers = [copy.copy(layer) for layer in given.layers]
    return kept


def pad_token(config: Any) -> int | None:
    """The id by which a model's own code knows padding."""
    found = getattr(config, "pad_token_id", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "pad_token_id", None)
    return found if isinstance(found, int) else None
