"""The scores of a batch of pairs: two forward passes, one backward, and the products of what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from gim import checkpoint, memory
from gim.circuits.graph import Graph
from gim.circuits.metrics import Answers, Metric
from gim.circuits.streams import TOGETHER, Heard, Hooks, Tiles, heads_part, mlp_part, products, written
from gim.circuits.wiring import Wiring
from gim.context import GIM
from gim.evaluation.perturbation import Forwards
from gim.intercept.session import stack_of
from gim.parts import anatomy
from gim.parts.calling import Kept
from gim.parts.parameters import frozen_parameters
from gim.plan import MemoryPlan
from gim.rules import Rules
from gim_kernels.types import Engine

Level = Literal["edge", "node"]
LEVELS: tuple[Level, ...] = ("edge", "node")


@dataclass(frozen=True)
class Batch:
    """Pairs of one length.

    Args:
        clean, corrupted: ids ``[B, T]``.
        answers: of each pair.
    """

    clean: torch.Tensor
    corrupted: torch.Tensor
    answers: list[Answers]

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class Scorer:
    """How pairs are scored.

    Args:
        model: a causal language model.
        wiring: of it.
        graph: with k and v for each query head.
        rules: of the backward.
        metric: the number that is asked for.
        level: scores of edges, or of nodes.
        ig_steps: points of EAP-IG from corrupted to clean; None for the clean prompt alone.
        plan: what is kept for the backward; ``"auto"`` for what fits.
        engine: as in :class:`gim.GIM`.
    """

    model: nn.Module
    wiring: Wiring
    graph: Graph
    rules: Rules
    metric: Metric
    level: Level
    ig_steps: int | None
    plan: MemoryPlan | str
    engine: Engine

    def scores(self, batch: Batch) -> torch.Tensor:
        """The sum over pairs, float64: ``[writers, readers]`` of edges, ``[writers]`` of nodes.

        Raises:
            FloatingPointError: the metric or the scores are not finite.
        """
        plan = self._plan(batch)
        with (
            stack_of(self.model).exclusive,
            frozen_parameters(self.model),
            GIM(self.model, rules=self.rules, engine=self.engine),
        ):
            changes = self._written(batch.corrupted)
            clean = None
            if self.ig_steps is not None:
                # The products are with what the clean run wrote, the gradients are those of other runs.
                start = changes[0].clone()
                with torch.no_grad(), written(self.wiring, lambda part, x: _subtract(changes, part, x)):
                    Forwards(self.model).logits(batch.clean)
                clean = start - changes[0]
            found = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
            for step in range(self.ig_steps or 1):
                begin = None
                if self.ig_steps is not None and clean is not None:
                    begin = (start + (step / self.ig_steps) * (clean - start)).view(*batch.clean.shape, -1)
                found += self._of_gradient(batch, plan, changes, begin)
        if not bool(torch.isfinite(found).all()):
            raise FloatingPointError("the scores hold NaN or infinity: run the model in a wider type")
        return found / (self.ig_steps or 1)

    @property
    def shape(self) -> tuple[int, ...]:
        graph = self.graph
        return (graph.writers, graph.readers) if self.level == "edge" else (graph.writers,)

    def _plan(self, batch: Batch) -> MemoryPlan:
        plan = self.plan
        if isinstance(plan, str):
            plan = self._chosen(batch) if plan == "auto" else MemoryPlan.parse(plan)
        return dataclasses.replace(plan, head="all")  # every token's writers and readers count

    def _chosen(self, batch: Batch) -> MemoryPlan:
        """The fastest plan that fits beside what every part wrote."""
        parts, layers = anatomy.of(self.model), self.wiring.layers
        free = memory.free_bytes(parts.device)
        if free is not None:
            numbers = (1 + len(layers)) * self.wiring.width + sum(layer.out.weight.shape[1] for layer in layers)
            free -= batch.clean.numel() * numbers * parts.dtype.itemsize
        return memory.choose(self.model, batch.clean, self.rules, free=free)

    def _written(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """What every part writes on a prompt, by part, ``[N, ..]``."""
        found: list[torch.Tensor] = []
        with torch.no_grad(), written(self.wiring, lambda _, x: found.append(x.flatten(0, -2).clone())):
            Forwards(self.model).logits(ids)
        return found

    def _of_gradient(
        self, batch: Batch, plan: MemoryPlan, changes: list[torch.Tensor], begin: torch.Tensor | None
    ) -> torch.Tensor:
        """The products of the changes and the gradients of one run, which begins with ``begin`` ``[B, T, C]``.

        Where it begins with the clean prompt itself, what it writes is subtracted from the changes.
        """
        found = torch.zeros(self.shape, dtype=torch.float64, device="cpu")
        if self.level == "node":
            told = _Told(self.wiring, self.graph, changes, found)
            self._backward(batch, plan, changes, begin, told.listening, told.first)
            return found
        heard = Heard(self.wiring)

        def finish(layers: range, _: torch.Tensor) -> None:
            products(Tiles(self.wiring, self.graph, changes, batch.clean.numel()), heard, self.graph, layers, found)
            heard.forget()

        self._backward(batch, plan, changes, begin, heard.listening, finish)
        return found * self.graph.edges

    def _stops(self, plan: MemoryPlan) -> list[range]:
        """The layers that a backward goes through before it stops, as it comes to them.

        What readers were told is held until then. At each stop heads are made as wide as the stream once more, so
        where every layer's activations are kept, which is more, there is one stop alone, at the end.
        """
        layers = range(self.graph.layers)
        step = len(layers) if plan.checkpoint == "none" else TOGETHER
        return [layers[max(0, stop - step) : stop] for stop in range(len(layers), 0, -step)]

    def _backward(
        self,
        batch: Batch,
        plan: MemoryPlan,
        changes: list[torch.Tensor],
        begin: torch.Tensor | None,
        listening: Callable[[], AbstractContextManager[None]],
        finish: Callable[[range, torch.Tensor], None],
    ) -> None:
        """A forward and a backward of minus the metric, which stops after every few layers.

        ``finish`` is then called with those layers and the gradient ``[N, C]`` of what the first of them reads.
        """
        starts: dict[int, torch.Tensor] = {}

        def leaf(x: torch.Tensor) -> torch.Tensor:
            return (x if begin is None else begin.to(x.dtype)).detach().requires_grad_(True)

        def start(index: int, x: torch.Tensor) -> None:
            starts[index] = x

        length = batch.clean.shape[1]
        kept = Kept(torch.tensor([length - 1], device=batch.clean.device), length)
        stops = self._stops(plan)
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(checkpoint.applied(plan, self.model, kept, batch.clean.device))
            hooks = stack.enter_context(Hooks())
            hooks.given(self.wiring.layers[0].module, leaf)
            for layers in stops:
                hooks.given(self.wiring.layers[layers[0]].module, partial(start, layers[0]))
            if begin is None:
                stack.enter_context(written(self.wiring, lambda part, x: _subtract(changes, part, x)))
            stack.enter_context(listening())
            values = self.metric(Forwards(self.model).logits(batch.clean), batch.answers)
            check_metric(values, len(batch))
            if not values.requires_grad:
                raise ValueError("metric must let a gradient through from the logits, and its numbers have none")
            out, told = -values.sum(), None
            del values
            for layers in stops:
                # Whatever is above has no other way down than the stream, which the wiring has proved.
                stream = starts.pop(layers[0])
                (told,) = torch.autograd.grad(out, stream, told)
                out = stream
                finish(layers, told.flatten(0, -2))


def check_metric(values: torch.Tensor, pairs: int) -> None:
    """Refuse what a metric gives where it is not one finite number a pair."""
    if not isinstance(values, torch.Tensor) or values.shape != (pairs,):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"metric must give one number a pair, [{pairs}], got {got}")
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError("metric: its numbers hold NaN or infinity")


def _subtract(changes: list[torch.Tensor], part: int, x: torch.Tensor) -> None:
    changes[part] -= x.flatten(0, -2)


class _Told:
    """What every writer was told in one backward, times its change, as soon as it is told.

    Args:
        wiring, graph: of the model.
        changes: by part.
        found: of every writer the sum over tokens and channels, ``[writers]``, float64, which this fills.
    """

    def __init__(self, wiring: Wiring, graph: Graph, changes: list[torch.Tensor], found: torch.Tensor) -> None:
        self._wiring = wiring
        self._graph = graph
        self._changes = changes
        self._found = found

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a forward pass and its backward fill the sums."""
        with Hooks() as hooks:
            for index, layer in enumerate(self._wiring.layers):
                hooks.made(layer.after_attention or layer.out.module, self._at(partial(self._heads, index)))
                hooks.made(layer.after_mlp or layer.mlp, self._at(partial(self._mlp, index)))
            yield

    @staticmethod
    def _at(told: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], torch.Tensor]:
        def see(x: torch.Tensor) -> torch.Tensor:
            if x.requires_grad:
                x.register_hook(lambda grad: told(grad.detach().flatten(0, -2)))
            return x

        return see

    def first(self, layers: range, grad: torch.Tensor) -> None:
        """The input, whose gradient ``[N, C]`` is what the first layer reads."""
        if layers[0] == 0:
            self._found[0] = self._product(0, grad).sum()

    def _heads(self, index: int, grad: torch.Tensor) -> None:
        layer, graph = self._wiring.layers[index], self._graph
        if layer.scale is not None:
            grad = grad * layer.scale
        by_head = self._product(heads_part(index), grad @ layer.out.weight).unflatten(0, (graph.heads, -1)).sum(-1)
        self._found[graph.head(index) : graph.mlp(index)] = by_head

    def _mlp(self, index: int, grad: torch.Tensor) -> None:
        self._found[self._graph.mlp(index)] = self._product(mlp_part(index), grad).sum()

    def _product(self, part: int, grad: torch.Tensor) -> torch.Tensor:
        """The sum over tokens of change times gradient, of each channel, or each of the heads' numbers: float64."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        return (self._changes[part].to(wide) * grad.to(wide)).sum(0).double().cpu()
