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
    """Inside, no parameter asks for a gradient, so that no layer keeps its input for one."""
    asking = [one for _, one in named_parameters(anatomy.of(model).modules) if one.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
