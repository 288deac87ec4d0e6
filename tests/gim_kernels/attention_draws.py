"""Random calls of attention, any layout, scale and temperature among them, and what each may err."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch

import gim_kernels
from gim_kernels import reference
from tests.gim_kernels.attention_terms import terms
from tests.oracle import assert_within_terms

#: Temperatures that have code of their own, and the extremes.
TEMPERATURES = (1.0, 2.0, 0.5, 1e-3, 1e3, 1e6)


def laid_out(x: torch.Tensor, strides: tuple[int, ...], offset: int) -> torch.Tensor:
    """The numbers of ``x`` at given strides, in memory that is NaN wherever they are not.

    Where several entries fall on one place, one of them counts for all.
    """
    last = sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True)) if x.numel() else 0
    memory = torch.full((offset + last + 1,), math.nan, dtype=x.dtype)
    y = memory.as_strided(x.shape, strides, offset)
    place = torch.arange(memory.numel()).as_strided(x.shape, strides, offset).reshape(-1)
    memory[place] = x.reshape(-1)
    return y


def draw_strides(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of any kind: dense in any order of dimensions, with gaps, expanded, or overlapping."""
    kind = rng.choice(("heads inside", "dense", "gaps", "expanded", "any"))
    if kind == "any":
        return tuple(rng.choice((0, 1, 2, 3, shape[-1], 40)) for _ in shape)
    order = [0, 2, 1, 3] if kind == "heads inside" else rng.sample(range(4), 4)
    strides, step = [0] * 4, 1
    for dimension in reversed(order):
        if kind == "gaps":
            step *= rng.choice((1, 1, 2, 3))
        strides[dimension] = step
        step *= shape[dimension] + (rng.choice((0, 0, 1)) if kind == "gaps" else 0)
    if kind == "expanded":
        for dimension in rng.sample(range(4), rng.choice((1, 1, 2))):
            strides[dimension] = 0
    return tuple(strides)


def _uniform(rng: random.Random, low: float, high: float) -> float:
    """A number between ``10^low`` and ``10^high``, each power as likely as the other."""
    return 10.0 ** rng.uniform(low, high)


@dataclass
class Draw:
    """One call: ``tensors`` are query, key, value, the upstream gradient and, where there are, the sinks."""

    seed: int
    dtype: torch.dtype
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    described: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"draw {self.seed} ({self.described})"


def draw(seed: int, dtypes: tuple[torch.dtype, ...], most: int = 3, longest: int = 70) -> Draw:
    """The call of a seed: at most ``most`` rows, key heads and query heads for each, ``longest`` queries and keys."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice(dtypes)
    batch, kv_heads, group = rng.randint(1, most), rng.randint(1, most), rng.randint(1, most)
    queries, keys, size = rng.randint(1, longest), rng.randint(1, longest), rng.choice((1, 2, 7, 8, 16, 24, 33))
    if rng.random() < 0.4:
        keys = queries
    shapes = {
        "query": (batch, kv_heads * group, queries, size),
        "key": (batch, kv_heads, keys, size),
        "value": (batch, kv_heads, keys, size),
        "grad_out": (batch, kv_heads * group, queries, size),
    }
    tensors, described = {}, {}
    for name, shape in shapes.items():
        strides = draw_strides(rng, shape)
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * rng.choice((0.3, 1.0, 2.0))
        tensors[name] = laid_out(numbers.to(dtype), strides, rng.choice((0, 0, 3)))
        described[name] = (shape, strides)
    options: dict[str, Any] = {
        "scale": rng.choice((None, None, 0.0, 1.0, -1.0)),
        "causal": rng.random() < 0.5,
        "window": rng.choice((None, None, rng.randint(1, keys + 1))),
        "softcap": rng.choice((None, None, _uniform(rng, -0.5, 1.5))),
        "softmax_backward": rng.choice(("exact", "constant", "temperature", "temperature", "temperature")),
        "temperature": rng.choice((*TEMPERATURES, *(_uniform(rng, -3, 3) for _ in TEMPERATURES))),
        "grad_scale": (0.25, 0.3, 0.5),
    }
    if options["scale"]:
        options["scale"] *= _uniform(rng, -3, 0)
    if rng.random() < 0.3:
        ends = [sorted((rng.randint(0, keys), rng.randint(0, keys))) for _ in range(batch)]
        options["key_range"] = torch.tensor(ends, dtype=torch.int32)
    if rng.random() < 0.3:
        sinks = 2 * torch.randn(kv_heads * group, generator=generator, dtype=torch.float64)
        tensors["sinks"] = sinks.to(dtype)
    described |= {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return Draw(seed, dtype, tensors, options, {"dtype": dtype, "sinks": "sinks" in tensors, **described})


def differentiate(function: Any, tensors: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """The output and every gradient of an attention function, by autograd; the leaves keep their strides."""
    leaves = {name: x.detach().requires_grad_(True) for name, x in tensors.items() if name != "grad_out"}
    out = function(**leaves, **options)
    grads = torch.autograd.grad(
        out, list(leaves.values()), tensors["grad_out"], allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check(given: Draw, engine: str) -> None:
    """Hold an engine against float64 and, in other dtypes, eager PyTorch, within what rounding makes of the draw."""
    got = differentiate(gim_kernels.attention, given.tensors, **given.options, engine=engine)
    yardstick = differentiate(reference.attention, given.tensors, **given.options)
    doubles = {name: x.double() for name, x in given.tensors.items()}
    truth = yardstick if given.dtype == torch.float64 else differentiate(reference.attention, doubles, **given.options)
    sizes = terms(given.tensors, **given.options)
    for name, x in got.items():
        assert_within_terms(x, truth[name], yardstick[name], sizes[name], f"{name} of {given}")
