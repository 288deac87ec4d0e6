"""TEMP"""
from __future__ import annotations
from torch import nn
def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model: those named so that contain no other."""
    named = {name: module for name, module in model.named_modules() if "Attention" in type(module).__name__}
    return {
        name: module
        for name, module in named.items()
        if not any(other != name and other.startswith(f"{name}." if name else "") for other in named)
    }



def patched_modules(module):
    return list(attention_modules(module).values())
