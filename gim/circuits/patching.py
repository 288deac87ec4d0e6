"""A circuit at work: a reader sees what its kept edges carry now, and what all others carried when corrupted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from gim.circuits.graph import Graph
from gim.circuits.scores import Batch
from gim.circuits.streams import Hooks, Tiles, written
from gim.circuits.wiring import Layer, Wiring
from gim.context import GIM
from gim.evaluation.perturbation import Forwards
from gim_kernels.types import Engine


@dataclass(frozen=True)
class Patcher:
    """Runs of a model in which edges are patched.

    Args:
        model: a causal language model.
        wiring: of it.
        graph: with k and v for each query head.
        engine: as in :class:`gim.GIM`.
    """

    model: nn.Module
    wiring: Wiring
    graph: Graph
    engine: Engine = "auto"

    @torch.no_grad()
    def plain(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The model's own logits ``[B, V]`` after prompts ``[B, T]``, and what every part writes, ``[N, ..]``."""
        parts: list[torch.Tensor] = []
        with self._context(), written(self.wiring, lambda _, x: parts.append(x.flatten(0, -2).clone())):
            logits = Forwards(self.model).logits(ids)
        return logits, parts

    @torch.no_grad()
    def logits(self, batch: Batch, corrupted: list[torch.Tensor], cut: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` after the clean prompts where edges are cut.

        Args:
            batch: the pairs.
            corrupted: what every part writes on the corrupted prompts, by :meth:`plain`.
            cut: ``[writers, readers]``, floating: 1 where an edge carries what its writer wrote on the corrupted
                prompt, 0 where it carries what it writes now; between them, a share.
        """
        with self._context(), Hooks() as hooks:
            run = _Run(self, corrupted, cut, batch.clean.numel(), hooks)
            with written(self.wiring, run.wrote):
                run.patch_layers()
                return Forwards(self.model).logits(batch.clean)

    def _context(self) -> GIM:
        return GIM(self.model, rules="GRADIENT", engine=self.engine)


class _Run:
    """One forward pass with cut edges."""

    def __init__(
        self, patcher: Patcher, corrupted: list[torch.Tensor], cut: torch.Tensor, tokens: int, hooks: Hooks
    ) -> None:
        self._wiring = patcher.wiring
        self._graph = patcher.graph
        self._corrupted = corrupted
        self._hooks = hooks
        #: Corrupted minus now, of each part, once it has written.
        self._changes = list(corrupted)
        self._tiles = Tiles(self._wiring, self._graph, self._changes, tokens)
        self._cut = (cut * self._graph.edges.to(cut.dtype)).to(corrupted[0].device, self._tiles.dtype)
        #: Whether anything that a writer writes is read; else what it reads does not matter. Through a norm behind
        #: attention, though, what one head writes decides how large the others are.
        self._heard = (self._cut != 1).logical_and(self._graph.edges.to(self._cut.device)).any(1)
        for index, layer in enumerate(self._wiring.layers):
            if layer.after_attention is not None:
                self._heard[self._graph.head(index) : self._graph.mlp(index)] = True
        #: What the heads of a layer's maps put out, by the map: columns and numbers ``[N, columns]``.
        self._outputs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._streams: dict[int, torch.Tensor] = {}
        #: Whether a norm runs for readers, and not in the model's own pass.
        self._aside = False

    def _norm(self, norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return x
        self._aside = True
        try:
            found: torch.Tensor = norm(x)
        finally:
            self._aside = False
        return found

    def wrote(self, part: int, x: torch.Tensor) -> None:
        self._changes[part] = self._corrupted[part] - x.flatten(0, -2)

    def patch_layers(self) -> None:
        """Set the hooks by which readers see their own mixes."""
        for index, layer in enumerate(self._wiring.layers):
            columns = self._attention_columns(index)
            if columns.numel():
                self._hooks.given(
                    layer.before_attention or layer.q.linear.module,
                    partial(self._heads, index, columns),
                )
                for module in {id(one.linear.module): one.linear.module for one in layer.branches.values()}.values():
                    self._hooks.made(module, partial(self._placed, layer, module))
            self._patch_mlp(index, layer)
        end = self._graph.readers - 1
        if bool(self._cut[:, end].any()):
            self._hooks.made(self._wiring.layers[-1].module, lambda x: self._mixed(self._graph.writers, end, x))

    def _attention_columns(self, index: int) -> torch.Tensor:
        """The columns, counted in the layer, of q, k and v that see anything cut, of heads that are heard."""
        graph = self._graph
        start = index * graph.of_layer
        cut = self._cut[: graph.head(index), start : start + 3 * graph.heads].any(0)
        heard = self._heard[graph.head(index) : graph.mlp(index)].repeat(3)
        return (cut & heard).nonzero().flatten()

    def _heads(self, index: int, columns: torch.Tensor, x: torch.Tensor) -> None:
        """Make what the maps put out for the heads that see a mix of their own."""
        if self._aside:
            return
        layer, graph = self._wiring.layers[index], self._graph
        x = x.flatten(0, -2)
        count, start = graph.head(index), index * graph.of_layer
        cut = self._cut[:count, start + columns].T
        parts = []
        for number, branch in enumerate(layer.branches.values()):
            mine = (columns // graph.heads == number).nonzero().flatten()
            heads = columns[mine] % graph.heads
            held = heads // (graph.heads // branch.heads)
            size = branch.columns.shape[1]
            places = branch.columns.to(x.device)[held]
            if layer.group > 1 and number > 0:  # where the ungrouped output has the query head
                places = heads[:, None] * size + torch.arange(size, device=x.device)
            bias = branch.linear.bias
            bias = None if bias is None else bias[branch.columns.to(x.device)[held]][:, None]
            parts.append((branch, mine, branch.weight[held].mT, bias, places))
        made = [x.new_empty(len(mine), x.shape[0], places.shape[1]) for _, mine, _, _, places in parts]
        for tokens in self._tiles.slices:
            mixed = cut @ self._tiles.writers(tokens, count).flatten(1)
            stream = (x[tokens].to(mixed.dtype) + mixed.view(len(columns), -1, self._wiring.width)).to(x.dtype)
            stream = self._norm(layer.before_attention, stream)
            for out, (_, mine, weight, bias, _places) in zip(made, parts, strict=True):
                product = torch.bmm(stream[mine], weight)
                out[:, tokens] = product if bias is None else product + bias
        self._outputs = {}
        for out, (branch, _, _, _, places) in zip(made, parts, strict=True):
            flat = out.transpose(0, 1).flatten(1)
            self._outputs.setdefault(id(branch.linear.module), []).append((places.flatten(), flat))

    def _placed(self, layer: Layer, module: nn.Module, out: torch.Tensor) -> torch.Tensor:
        """What a map puts out, with the heads that see a mix of their own in their places."""
        grouped = layer.group > 1 and module is not layer.q.linear.module
        out = layer.ungroup(out) if grouped else out.clone()
        for places, numbers in self._outputs[id(module)]:
            out[..., places] = numbers.view(*out.shape[:-1], -1)
        return out

    def _patch_mlp(self, index: int, layer: Layer) -> None:
        graph = self._graph
        count, column = graph.before_mlp(index), graph.mlp_reader(index)
        if not bool(self._cut[:count, column].any()) or not bool(self._heard[graph.mlp(index)]):
            return
        norm = layer.before_mlp
        if norm is not None and layer.shares_norm:
            self._hooks.given(norm, lambda x: None if self._aside else self._streams.__setitem__(index, x))
            self._hooks.given(
                layer.mlp, lambda _: self._norm(norm, self._mixed(count, column, self._streams.pop(index)))
            )
            return
        self._hooks.given(layer.before_mlp or layer.mlp, lambda x: self._mixed(count, column, x))

    def _mixed(self, count: int, column: int, x: torch.Tensor) -> torch.Tensor:
        """The stream ``[B, T, C]`` as one reader sees it."""
        flat, cut = x.flatten(0, -2), self._cut[None, :count, column]
        found = torch.empty_like(flat)
        for tokens in self._tiles.slices:
            mixed = cut @ self._tiles.writers(tokens, count).flatten(1)
            found[tokens] = (flat[tokens].to(mixed.dtype) + mixed.view(-1, self._wiring.width)).to(x.dtype)
        return found.view_as(x)
