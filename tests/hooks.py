"""What a user's hook computes, with a backward that nothing can intercept."""

from __future__ import annotations

from collections.abc import Callable

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


def ordinary(function: Function) -> Function:
    """``function`` of a tensor of the same shape, whose gradient is taken apart, by autograd on a leaf of its own."""

    def apart(x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            value = function(leaf)
            y = value.detach() + (x - x.detach()).nan_to_num()  # the value; of a mask's -inf too
        if y.requires_grad:
            y.register_hook(lambda grad: torch.autograd.grad(value, leaf, grad, retain_graph=True)[0])
        return y

    return apart
