"""A model's parameters, and those of it while it is explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from gim.parts import anatomy


def named_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of modules, given by their names; one that several hold comes with each."""
    for name, module in modules.items():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{own}" if name else own, parameter


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, so that no layer keeps its input for one.

    Raises:
        ValueError: a parameter was made where gradients do not exist; names it.
    """
    asking = {name: one for name, one in named_parameters(anatomy.of(model).modules) if one.requires_grad}
    made = next((name for name, one in asking.items() if one.is_inference()), None)
    if made is not None:
        raise ValueError(
            f"{made} was made under torch.inference_mode(), and no gradient goes through it: make or load the model "
            "outside"
        )
    try:
        for parameter in asking.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking.values():
            parameter.requires_grad_(True)
