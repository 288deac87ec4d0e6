"""The scores of a batch of pairs: two forward passes, one backward, and the products of what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gim import checkpoint, memory
from gim.circuits.graph import Graph
from gim.circuits.metrics import Answers, Metric
from gim.circuits.streams import Heard, Hooks, Tiles, heads_part, mlp_part, products, written
from gim.circuits.wiring import Wiring
from gim.context import GIM
from gim.evaluation.perturbation import Forwards
from gim.intercept.session import stack_of
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
            found = torch.zeros(self.shape, dtype=torch.float64)
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
            plan = memory.choose(self.model, batch.clean, self.rules) if plan == "auto" else MemoryPlan.parse(plan)
        return dataclasses.replace(plan, head="all")  # every token's writers and readers count

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
        tokens = batch.clean.numel()
        if self.level == "edge":
            heard = Heard(self.wiring)
            self._backward(batch, plan, changes, begin, heard.listening)
            return products(Tiles(self.wiring, self.graph, changes, tokens), heard, self.graph)
        told = _Told(self.wiring)
        told.input = self._backward(batch, plan, changes, begin, told.listening)
        return told.products(self.graph, changes)

    def _backward(
        self,
        batch: Batch,
        plan: MemoryPlan,
        changes: list[torch.Tensor],
        begin: torch.Tensor | None,
        listening: Callable[[], AbstractContextManager[None]],
    ) -> torch.Tensor:
        """A forward and a backward of minus the metric; the gradient ``[N, C]`` of what the first layer reads."""
        leaves: list[torch.Tensor] = []

        def leaf(x: torch.Tensor) -> torch.Tensor:
            leaves.append((x if begin is None else begin.to(x.dtype)).detach().requires_grad_(True))
            return leaves[-1]

        length = batch.clean.shape[1]
        kept = Kept(torch.tensor([length - 1], device=batch.clean.device), length)
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(checkpoint.applied(plan, self.model, kept, batch.clean.device))
            hooks = stack.enter_context(Hooks())
            hooks.given(self.wiring.layers[0].module, leaf)
            if begin is None:
                stack.enter_context(written(self.wiring, lambda part, x: _subtract(changes, part, x)))
            stack.enter_context(listening())
            values = self.metric(Forwards(self.model).logits(batch.clean), batch.answers)
            check_metric(values, len(batch))
            (grad,) = torch.autograd.grad(-values.sum(), leaves[0])
        return grad.flatten(0, -2)


def check_metric(values: torch.Tensor, pairs: int) -> None:
    """Refuse what a metric gives where it is not one finite number a pair."""
    if values.shape != (pairs,):
        raise ValueError(f"metric must give one number a pair, [{pairs}], got {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError("metric: its numbers hold NaN or infinity")


def _subtract(changes: list[torch.Tensor], part: int, x: torch.Tensor) -> None:
    changes[part] -= x.flatten(0, -2)


class _Told:
    """What every writer was told in one backward: the gradient of what it wrote, as wide as the stream."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.gradients: dict[int, torch.Tensor] = {}
        self.input: torch.Tensor

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, a forward pass and its backward fill this."""
        with Hooks() as hooks:
            for index, layer in enumerate(self.wiring.layers):
                hooks.made(layer.after_attention or layer.out.module, self._keeping(heads_part(index)))
                hooks.made(layer.after_mlp or layer.mlp, self._keeping(mlp_part(index)))
            yield

    def _keeping(self, part: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def keep(grad: torch.Tensor) -> None:
            self.gradients[part] = grad.detach().flatten(0, -2)

        def see(x: torch.Tensor) -> torch.Tensor:
            if x.requires_grad:
                x.register_hook(keep)
            return x

        return see

    def products(self, graph: Graph, changes: list[torch.Tensor]) -> torch.Tensor:
        """Every writer's sum over tokens and channels of its change times its gradient: ``[writers]``, float64."""
        found = torch.zeros(graph.writers, dtype=torch.float64)
        wide = torch.promote_types(changes[0].dtype, torch.float32)

        def product(part: int, grad: torch.Tensor) -> torch.Tensor:
            """Of each channel, or each of the heads' numbers."""
            return (changes[part].to(wide) * grad.to(wide)).sum(0).double().cpu()

        found[0] = product(0, self.input).sum()
        for index, layer in enumerate(self.wiring.layers):
            grad = self.gradients[heads_part(index)]
            if layer.scale is not None:
                grad = grad * layer.scale
            by_head = product(heads_part(index), grad @ layer.out.weight).unflatten(0, (graph.heads, -1)).sum(-1)
            found[graph.head(index) : graph.mlp(index)] = by_head
            found[graph.mlp(index)] = product(mlp_part(index), self.gradients[mlp_part(index)]).sum()
        return found
