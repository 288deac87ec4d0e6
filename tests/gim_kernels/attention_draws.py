"""Random calls of attention, any layout, scale and temperature among them, and what each may err."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import gim_kernels
from gim_kernels import reference
from tests.oracle import assert_close64, assert_within_budget, rounded_otherwise

#: Eager runs with their sums in other orders, and truths for inputs rounded otherwise, that a failing draw is held
#: against.
OTHERS = 4
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


def _reordered(given: Draw, rng: random.Random) -> dict[str, torch.Tensor]:
    """Eager PyTorch in the draw's dtype, which sums over the features in another order."""
    size = given.tensors["query"].shape[-1]
    order = {name: rng.sample(range(size), size) for name in ("scores", "values")}
    of = {"query": "scores", "key": "scores", "value": "values", "grad_out": "values", "out": "values"}
    tensors = {name: x[..., order[of[name]]] if name in of else x for name, x in given.tensors.items()}
    found = differentiate(reference.attention, tensors, **given.options)
    back = {name: torch.tensor(positions).argsort() for name, positions in order.items()}
    return {name: x[..., back[of[name]]] if name in of else x for name, x in found.items()}


def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    key_range: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The reference one query at a time, so that the gradients of keys and values are sums one after the other."""
    batch, heads, queries, _ = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    first, end = (torch.zeros(batch), torch.full((batch,), keys)) if key_range is None else key_range.unbind(-1)
    rows = []
    for head in range(heads):
        one, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        for row in range(queries):
            position = row + keys - queries
            low = first if window is None else first.clamp(min=position - window + 1)
            high = end.clamp(max=position + 1) if causal else end
            rows.append(
                reference.attention(
                    query[:, one, row : row + 1],
                    key[:, shared],
                    value[:, shared],
                    sinks=None if sinks is None else sinks[one],
                    key_range=torch.stack([low, high], dim=-1).to(torch.int32),
                    **options,
                )
            )
    return torch.cat(rows, dim=2).view(batch, heads, queries, -1)


def _sums_of_rows(given: Draw, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What one rounding of each row's ``delta`` makes of the gradients: ``dS' = P_T (dP - delta)``.

    Where a softmax is 1 at one key the two cancel, and all that is left is the rounding of ``dP``. Added to delta, a
    number ``c_i`` adds ``c_i P_T`` to the gradient of the scores: that of ``c_i T logsumexp(S' / T)``.
    """
    options = {"window": None, "key_range": None, **given.options}
    if options["softmax_backward"] == "constant":
        return {}
    temperature = options["temperature"] if options["softmax_backward"] == "temperature" else 1.0
    leaves = {name: x.detach().double() for name, x in given.tensors.items() if name in ("query", "key", "sinks")}
    query, key = (leaves[name].requires_grad_(True) for name in ("query", "key"))
    value, grad_out = (given.tensors[name].double().abs() for name in ("value", "grad_out"))
    group = query.shape[1] // key.shape[1]
    mask = reference.visible(
        query.shape[2], key.shape[2], causal=options["causal"], window=options["window"],
        key_range=options["key_range"], device=query.device,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    scores = scale * query @ key.repeat_interleave(group, dim=1).mT
    if options["softcap"] is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~mask, -1e300)
    if "sinks" in leaves:
        column = leaves["sinks"].requires_grad_(True)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    total = temperature * torch.logsumexp(scores / temperature, dim=-1)  # [B, HQ, T]
    largest = (grad_out @ value.repeat_interleave(group, dim=1).mT).masked_fill(~mask, 0.0).amax(-1)
    sign = torch.randint(0, 2, largest.shape, generator=generator, dtype=torch.float64) * 2 - 1
    moved = torch.finfo(torch.promote_types(given.dtype, torch.float32)).eps * sign * largest
    grads = torch.autograd.grad(total, list(leaves.values()), moved)
    factors = {"query": options["grad_scale"][0], "key": options["grad_scale"][1], "sinks": 1.0}
    return {name: factors[name] * grad for name, grad in zip(leaves, grads, strict=True)}


def others(given: Draw, truth: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """What else eager PyTorch may give, and what else the truth may be: see :mod:`tests.oracle`."""
    rng, generator = random.Random(given.seed), torch.Generator().manual_seed(given.seed)
    if given.dtype in (torch.float32, torch.float64):  # a sum of many half-precision numbers tells nothing
        for _ in range(OTHERS):
            # Gradients are linear in the upstream one; other numbers of the same structure are rounded otherwise.
            factor = rng.uniform(1.0, 2.0)
            scaled = {**given.tensors, "grad_out": given.tensors["grad_out"] * factor}
            found = differentiate(_row_by_row, scaled, **given.options)
            yield {name: x if name == "out" else x / factor for name, x in found.items()}
    wide = torch.promote_types(given.dtype, torch.float32)
    for _ in range(OTHERS):
        yield _reordered(given, rng)
        moved = {name: rounded_otherwise(x, wide, generator) for name, x in given.tensors.items()}
        yield differentiate(reference.attention, moved, **given.options)
        added = _sums_of_rows(given, generator)
        yield {name: x.double() + added.get(name, 0.0) for name, x in truth.items()}


def check(given: Draw, engine: str) -> bool:
    """Hold an engine against the truth of a draw; the others are asked for only where one eager run does not tell.

    Returns:
        Whether one eager run told.
    """
    got = differentiate(gim_kernels.attention, given.tensors, **given.options, engine=engine)
    yardstick = differentiate(reference.attention, given.tensors, **given.options)
    doubles = {name: x.double() for name, x in given.tensors.items()}
    truth = yardstick if given.dtype == torch.float64 else differentiate(reference.attention, doubles, **given.options)
    try:
        _hold(got, truth, [yardstick], given)
    except AssertionError:
        _hold(got, truth, [yardstick, *others(given, truth)], given)
        return False
    return True


def _hold(
    got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], runs: list[dict[str, torch.Tensor]], given: Draw
) -> None:
    for name, x in got.items():
        what = f"{name} of {given}"
        if given.dtype == torch.float64:
            assert_close64(x, truth[name], what, others=[run[name] for run in runs[1:]])
        else:
            assert_within_budget(x, truth[name], [run[name] for run in runs], what)
