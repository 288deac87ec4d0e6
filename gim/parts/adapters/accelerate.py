"""Modules that accelerate has hooked, told without importing it."""

from __future__ import annotations

from torch import nn

#: What accelerate keeps on a module that it has hooked.
KEPT = frozenset({"_hf_hook", "_old_forward"})


def only_moves(module: nn.Module) -> bool:
    """Whether a hook of accelerate is all that stands before a module's own code, and does no more than move tensors
    to the module's device."""
    hook = module.__dict__.get("_hf_hook")
    if type(hook).__module__ != "accelerate.hooks" or type(hook).__name__ != "AlignDevicesHook":
        return False
    own = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    return not getattr(hook, "offload", True) and not getattr(hook, "no_grad", True) and own is type(module).forward
