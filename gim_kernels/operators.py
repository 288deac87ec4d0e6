"""Operators of torch's dispatcher: ``torch.compile`` sees one node each, checkpoints keep their outputs by name.

The dispatcher calls code in Python at a price: it packs and unpacks every argument, twice where there is a gradient.
Where nobody could see a call there, it is left out, and the same autograd function calls the same code.
``torch.library.custom_op`` registers the same: by it a step of an operator that computes nothing takes 2.3 times as
long, and 1.8 times as long as by the dispatcher and the autograd function of this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

_LIBRARY = torch.library.Library("gim_kernels", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
#: Of ``torch.autograd.grad(..., is_grads_batched=True)``, which no stack of interpreters knows.
_is_batched = torch._C._functorch.is_legacy_batchedtensor
#: Tensors without code of their own.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def _nobody_sees(tensors: Sequence[Any]) -> bool:
    """Whether a call of an operator may pass the dispatcher by: no mode, transform, trace or profiler is on, and the
    first of ``tensors`` has data."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
        and _PLAIN.issuperset(map(type, tensors))
        and not _is_batched(tensors[0])  # a backward's gradient
        and (tensors[0].is_cuda or tensors[0].is_cpu)
    )


def _all_tensors(run: Callable[..., Any], *given: Any) -> Any:
    """What ``run`` gives, with an empty tensor in place of each None."""
    found = run(*given)
    if isinstance(found, tuple):
        return tuple(given[0].new_empty(0) if one is None else one for one in found)
    return found


def _vmap_rule(operator: Callable[..., Any], several: Callable[..., Any] | None) -> Callable[..., Any]:
    """The rule of an operator under ``torch.vmap``: one call after the other, but where ``several`` takes several
    gradients of one output together."""

    def rule(info: Any, in_dims: Sequence[Any], *given: Any) -> Any:
        batched = [isinstance(dim, int) for dim in in_dims]
        if several is not None and batched[0] and not any(batched[1:]):
            found = _all_tensors(several, given[0].movedim(in_dims[0], 0), *given[1:])
            if found is not None:
                # What nobody asked for is empty, whatever the batch.
                return found, tuple(0 if need else None for need in given[-1])
        calls = [
            operator(
                *(x.select(dim, i) if is_one else x for x, dim, is_one in zip(given, in_dims, batched, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(one) for one in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
    several: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``gim_kernels::name`` and give what calls it.

    Args:
        schema: ``"name(arguments) -> results"`` in torch's notation.
        run: computes the results, on every device; None stands for a gradient that nobody asked for, in whose place
            the dispatcher, which knows tensors only, gives an empty one like the first argument.
        fake: results of the right shapes, dtypes and strides, from inputs without numbers.
        save: ``save(ctx, inputs, results)`` of an autograd function.
        differentiate: its ``backward(ctx, *grads)``, a gradient or None for each tensor among the arguments. Without
            it a gradient through the operator is an error.
        several: of a backward, whose first argument is a gradient and whose last is ``bool[] needs``: computes the
            results for several gradients ``[N, ...]`` of one output together, each with N in front, or gives None where
            one call after the other is as good.

    Returns:
        The operator, to be called with all arguments in the schema's order.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, functools.partial(_all_tensors, run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gim_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.gim_kernels, name).default
    torch.library.register_vmap(f"gim_kernels::{name}", _vmap_rule(operator, several), lib=_LIBRARY)
    tensors = [i for i, one in enumerate(operator._schema.arguments) if "Tensor" in str(one.type)]
    tensors_of = itemgetter(*tensors)
    leading = len(tensors)  # of what has a gradient, all tensors come first

    def refuse() -> Any:
        raise RuntimeError(f"gim_kernels::{name} has no autograd formula: no gradient goes through it")

    def differentiable(compute: Callable[..., Any]) -> Callable[..., Any]:
        """``compute`` with the operator's gradient."""

        # Autograd looks at every argument of its own: what is no tensor comes as one.
        def forward(ctx: Any, *given: Any) -> Any:
            inputs = (*given[:-1], *given[-1])
            with _below_autograd():
                results = compute(*inputs)
            if save is not None:
                save(ctx, inputs, results)
            return results

        def backward(ctx: Any, *grads: Any) -> Any:
            return refuse() if differentiate is None else (*differentiate(ctx, *grads), None)

        # The name of its nodes, by which what reads a graph knows the operator.
        function: Any = type(
            f"gim_kernels_{name}",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(backward),
            },
        )

        def call(*inputs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return function.apply(*inputs[:leading], inputs[leading:])
            with _below_autograd():
                return compute(*inputs)

        return call

    _LIBRARY.impl(name, differentiable(operator), "Autograd")
    unseen = differentiable(run)

    def call(*inputs: Any) -> Any:
        if not torch.compiler.is_compiling() and _nobody_sees(tensors_of(inputs)):
            return unseen(*inputs)
        return operator(*inputs)

    return call
