"""Operators of torch's dispatcher: ``torch.compile`` sees one node each, checkpoints keep their outputs by name.

``torch.library.custom_op`` registers the same and costs a fifth to a quarter more host time for a small step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gim_kernels", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``gim_kernels::name`` and give what calls it.

    Args:
        schema: ``"name(arguments) -> results"`` in torch's notation.
        run: computes the results, on every device.
        fake: results of the right shapes, dtypes and strides, from inputs without numbers.
        save: ``save(ctx, inputs, results)`` of an autograd function.
        differentiate: its ``backward(ctx, *grads)``. Without it a gradient through the operator is an error.

    Returns:
        The operator, to be called with all arguments in the schema's order.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gim_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.gim_kernels, name).default

    def forward(ctx: Any, *inputs: Any) -> Any:
        with _below_autograd():
            results = operator(*inputs)
        if save is not None:
            save(ctx, inputs, results)
        return results

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"gim_kernels::{name} has no autograd formula: no gradient goes through it")

    # The name of its nodes, by which what reads a graph knows the operator.
    function: Any = type(
        f"gim_kernels_{name}",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(differentiate or refuse),
        },
    )

    def differentiable(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return function.apply(*inputs)
        with _below_autograd():
            return operator(*inputs)

    _LIBRARY.impl(name, differentiable, "Autograd")
    return operator
