"""Autograd inside an operator's own code, for engines that are made of functions that torch can differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def recording() -> Iterator[None]:
    """Inside, what runs is recorded for a backward, though torch calls an operator's code below autograd."""
    keys = torch._C.DispatchKey
    outside = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradMeta, keys.AutogradOther, keys.ADInplaceOrView):
        outside = outside.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), outside), torch.enable_grad():
        yield


def leaf(x: torch.Tensor, need: bool) -> torch.Tensor:
    """The same numbers, from which a graph may start."""
    return x.detach().requires_grad_(need)


def gradients(
    out: torch.Tensor, grad_out: torch.Tensor, leaves: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients of the leaves that ask for one, zeros where nothing reaches them; None for the others."""
    asking = [x for x in leaves if x is not None and x.requires_grad]
    if not asking:
        return [None] * len(leaves)
    if not out.requires_grad:
        found = iter([torch.zeros_like(x) for x in asking])
    else:
        found = iter(torch.autograd.grad(out, asking, grad_out, allow_unused=True, materialize_grads=True))
    return [next(found) if x is not None and x.requires_grad else None for x in leaves]
