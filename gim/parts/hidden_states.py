"""The dtype and the device of what goes from layer to layer.

Weights do not tell: a quantised layer holds int8 or packed uint8, as parameters or as buffers, and what floats in it
are its scales, while what it takes and gives are the model's hidden states.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def dtypes_taken(module: nn.Module, hidden: torch.dtype) -> list[torch.dtype]:
    """The dtypes in which a module may take hidden states, the likeliest first.

    Args:
        module: a part of a model, its weights of any kind.
        hidden: of the model's hidden states.
    """
    own = [x.dtype for x in module.parameters() if x.dtype.is_floating_point]
    # A layer of a model in mixed precision takes its own weights' dtype; one that is quantised has only scales of it.
    return list(dict.fromkeys([*own[:1], hidden]))


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module's first parameter is, or its first buffer; None where it has neither."""
    held = next(chain(module.parameters(), module.buffers()), None)
    return None if held is None else held.device


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """What a module maps with: its parameters, and the buffers that quantised layers hold in their place."""
    return [*module.parameters(), *module.buffers()]
