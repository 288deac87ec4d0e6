"""What a layer consists of, as far as a memory plan must know it before the layer has run.

It decides what a plan runs apart, never what a rule acts on; what is wrong here costs memory, or is refused.
"""

from __future__ import annotations

from torch import nn


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
