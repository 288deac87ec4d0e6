"""What reads and what writes the residual stream in each layer, and where the call of a module has that stream.

:mod:`gim.circuits.probe` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gim.circuits.graph import Graph


@dataclass(frozen=True)
class Linear:
    """A linear map ``y = x W^T (+ b)`` of the model's own.

    Args:
        name: of the module.
        module: has the ``weight``, ``[out, in]``, or ``[in, out]`` where it is ``transposed``.
        transposed: how the weight lies.
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        """``[out, in]``, a view of the module's own."""
        held: Any = self.module.weight
        return held.detach().T if self.transposed else held.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        """``[out]``, or None."""
        held: Any = getattr(self.module, "bias", None)
        return None if held is None else held.detach()


@dataclass(frozen=True)
class Branch:
    """Where the heads of q, k or v are in the output of a linear map.

    Args:
        linear: the map.
        columns: ``[heads, D]``, of its outputs.
    """

    linear: Linear
    columns: torch.Tensor

    @property
    def heads(self) -> int:
        return self.columns.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """``[heads, D, in]``."""
        return picked(self.linear.weight, self.columns)


def picked(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows ``[heads, D, ..]`` of ``x`` ``[out, ..]``: a view where they lie evenly, as they do in known layouts."""
    heads, size = columns.shape
    start = int(columns[0, 0])
    step = int(columns[1, 0]) - start if heads > 1 else size
    if step > 0:
        even = start + step * torch.arange(heads, device="cpu")[:, None] + torch.arange(size, device="cpu")
        if torch.equal(even, columns):
            stride = x.stride(0)
            offset = x.storage_offset() + start * stride
            return x.as_strided((heads, size, *x.shape[1:]), (step * stride, stride, *x.stride()[1:]), offset)
    return x[columns.to(x.device)]


@dataclass(frozen=True)
class Layer:
    """What reads and what writes in one layer.

    Args:
        name: of the layer.
        module: the layer.
        attention, mlp: its two parts.
        before_attention, before_mlp: the norms between the stream and them; None for none.
        after_attention, after_mlp: the norms between them and the stream; None for none.
        scale: ``[C]``, what ``after_attention`` multiplies channels by, but for one number a token; None for no norm.
        q, k, v: where the heads are.
        out: from the heads ``[.., HQ * D]`` to the stream.
    """

    name: str
    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    before_attention: nn.Module | None
    before_mlp: nn.Module | None
    after_attention: nn.Module | None
    after_mlp: nn.Module | None
    scale: torch.Tensor | None
    q: Branch
    k: Branch
    v: Branch
    out: Linear

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def shares_norm(self) -> bool:
        """Whether one norm stands before both parts."""
        return self.before_mlp is not None and self.before_mlp is self.before_attention

    @property
    def group(self) -> int:
        """Query heads of each key head."""
        return self.q.heads // self.k.heads

    def ungroup(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values ``[.., HK * D]`` of a linear map, once for each query head: ``[.., HQ * D]``.

        A model that goes on with these gives every query head a key of its own, and no weight is copied.
        """
        heads = x.unflatten(-1, (self.k.heads, 1, -1)).expand(*x.shape[:-1], self.k.heads, self.group, -1)
        return heads.flatten(-3)


@dataclass(frozen=True)
class Wiring:
    """A model's layers, as far as circuits need them.

    Args:
        layers: in order.
        parallel: whether a layer's MLP reads what its attention reads.
        width: of the residual stream.
    """

    layers: tuple[Layer, ...]
    parallel: bool
    width: int

    def graph(self, *, grouped: bool = False) -> Graph:
        """The graph of these layers; ``grouped`` counts k and v for each key head."""
        first = self.layers[0]
        groups = first.k.heads if grouped and first.group > 1 else None
        return Graph(len(self.layers), first.q.heads, self.parallel, self.width, groups)


def statistic(given: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The number a token ``[..]`` by which ``out = number * scale * given``, in least squares; 0 where all is 0."""
    scaled = given * scale
    size = scaled.square().sum(-1)
    return torch.where(size == 0, 0.0, (scaled * out).sum(-1) / size)


def first_tensor(out: Any) -> Any:
    """What a module puts out, or the first of several."""
    return out[0] if isinstance(out, tuple | list) and out else out


def with_stream(
    inputs: tuple[Any, ...], named: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
    """A module's arguments, the first tensor among them changed where ``change`` gives another; and that tensor."""
    if inputs:
        changed = change(inputs[0])
        stream = inputs[0] if changed is None else changed
        return (stream, *inputs[1:]), named, stream
    name = next(name for name, one in named.items() if isinstance(one, torch.Tensor))
    changed = change(named[name])
    stream = named[name] if changed is None else changed
    return inputs, {**named, name: stream}, stream
