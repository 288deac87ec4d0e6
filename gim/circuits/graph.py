"""The graph of a model: who writes into the residual stream, who reads it, and which of them can meet.

Names, order and pruning are those of EAP-IG's graph, in which MIB's benchmark exchanges circuits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from gim.targets import whole_number

BRANCHES = ("q", "k", "v")


def check_count(count: object, most: int, what: str, least: int = 0) -> int:
    """A number of edges or nodes that there are; anything else is refused."""
    found = whole_number(count)
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise ValueError(f"n must be in {least}..{most}, as many {what} as there are, got {count!r:.80}")
    return found


@dataclass(frozen=True)
class Graph:
    """Writers and readers of a decoder.

    Writers in order: the input, then for each layer its query heads and its MLP. Readers in order: for each layer the
    q of all query heads, their k, their v, then the MLP; last the end, which EAP-IG calls ``logits``.

    Args:
        layers: how many there are.
        heads: query heads of a layer.
        groups: key heads of a layer where k and v are counted for each of those; None for each query head, as in MIB.
        parallel: whether a layer's MLP reads what its attention reads, not what that has written.
        width: of the residual stream.
    """

    layers: int
    heads: int
    parallel: bool
    width: int
    groups: int | None = None

    @property
    def keys(self) -> int:
        """Columns of k, and of v, of a layer."""
        return self.heads if self.groups is None else self.groups

    @property
    def of_layer(self) -> int:
        """Readers of a layer."""
        return self.heads + 2 * self.keys + 1

    @property
    def writers(self) -> int:
        """Rows of a matrix of scores."""
        return 1 + self.layers * (self.heads + 1)

    @property
    def readers(self) -> int:
        """Columns of a matrix of scores."""
        return self.layers * self.of_layer + 1

    def head(self, layer: int, head: int = 0) -> int:
        """The row of a head; that of the first is also how many writers a layer's attention reads."""
        return 1 + layer * (self.heads + 1) + head

    def mlp(self, layer: int) -> int:
        """The row of an MLP."""
        return self.head(layer, self.heads)

    def before_mlp(self, layer: int) -> int:
        """How many writers a layer's MLP reads."""
        return self.head(layer) if self.parallel else self.mlp(layer)

    def branch(self, layer: int, branch: str) -> slice:
        """The columns of a layer's q, k or v."""
        start = layer * self.of_layer
        bounds = (0, self.heads, self.heads + self.keys, self.heads + 2 * self.keys)
        place = BRANCHES.index(branch)
        return slice(start + bounds[place], start + bounds[place + 1])

    def mlp_reader(self, layer: int) -> int:
        """The column of an MLP."""
        return (layer + 1) * self.of_layer - 1

    @cached_property
    def writer_names(self) -> list[str]:
        """``input``, ``a0.h0``, ..., ``m0``, ``a1.h0``, ..."""
        found = ["input"]
        for layer in range(self.layers):
            found += [f"a{layer}.h{head}" for head in range(self.heads)]
            found.append(f"m{layer}")
        return found

    @cached_property
    def reader_names(self) -> list[str]:
        """``a0.h0<q>``, ..., ``m0``, ..., ``logits``; a grouped key head is ``a0.g0<k>``."""
        found = []
        grouped = "h" if self.groups is None else "g"
        for layer in range(self.layers):
            found += [f"a{layer}.h{head}<q>" for head in range(self.heads)]
            found += [f"a{layer}.{grouped}{head}<{branch}>" for branch in "kv" for head in range(self.keys)]
            found.append(f"m{layer}")
        return [*found, "logits"]

    @cached_property
    def edges(self) -> torch.Tensor:
        """Which pairs can meet: booleans ``[writers, readers]``."""
        found = torch.zeros(self.writers, self.readers, dtype=torch.bool, device="cpu")
        for layer in range(self.layers):
            start = layer * self.of_layer
            found[: self.head(layer), start : self.mlp_reader(layer)] = True
            found[: self.before_mlp(layer), self.mlp_reader(layer)] = True
        found[:, -1] = True
        return found

    @cached_property
    def feeds(self) -> torch.Tensor:
        """Which readers a writer is made from: booleans ``[writers, readers]``."""
        found = torch.zeros(self.writers, self.readers, dtype=torch.bool, device="cpu")
        group = self.heads // self.keys
        for layer in range(self.layers):
            for head in range(self.heads):
                row = self.head(layer, head)
                found[row, self.branch(layer, "q").start + head] = True
                for branch in "kv":
                    found[row, self.branch(layer, branch).start + head // group] = True
            found[self.mlp(layer), self.mlp_reader(layer)] = True
        return found

    @property
    def edge_count(self) -> int:
        """How many pairs can meet."""
        of_heads = self.heads + 2 * self.keys
        return self.writers + sum(self.head(one) * of_heads + self.before_mlp(one) for one in range(self.layers))

    def names(self) -> Iterator[tuple[str, int, int]]:
        """Every edge in EAP-IG's words, ``a0.h1->m2`` or ``m0->a1.h0<k>``, with its row and column."""
        for row, column in self.edges.nonzero().tolist():
            yield f"{self.writer_names[row]}->{self.reader_names[column]}", row, column

    def ungrouped(self) -> Graph:
        """The same graph with k and v for each query head."""
        return Graph(self.layers, self.heads, self.parallel, self.width)

    def expand(self, kept: torch.Tensor) -> torch.Tensor:
        """Columns of this graph ``[writers, readers]`` as those of :meth:`ungrouped`: a key head's are its queries'."""
        if self.groups is None:
            return kept
        whole = self.ungrouped()
        found = kept.new_zeros(whole.writers, whole.readers)
        for mine, theirs, repeat in self._columns(whole):
            found[:, theirs] = kept[:, mine].repeat_interleave(repeat, 1)
        return found

    def gather(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``[writers, readers]`` of :meth:`ungrouped`, those of a key head's queries summed."""
        if self.groups is None:
            return scores
        found = scores.new_zeros(self.writers, self.readers)
        for mine, theirs, repeat in self._columns(self.ungrouped()):
            found[:, mine] = scores[:, theirs].unflatten(1, (-1, repeat)).sum(-1)
        return found

    def _columns(self, whole: Graph) -> Iterator[tuple[slice, slice, int]]:
        for layer in range(self.layers):
            for branch in BRANCHES:
                repeat = 1 if branch == "q" else self.heads // self.keys
                yield self.branch(layer, branch), whole.branch(layer, branch), repeat
            mine, theirs = self.mlp_reader(layer), whole.mlp_reader(layer)
            yield slice(mine, mine + 1), slice(theirs, theirs + 1), 1
        yield slice(self.readers - 1, self.readers), slice(whole.readers - 1, whole.readers), 1

    # -- circuits

    def top(self, scores: torch.Tensor, count: int, *, absolute: bool = False) -> torch.Tensor:
        """The ``count`` strongest edges, pruned until they are connected: booleans ``[writers, readers]``.

        Of equal scores the one first in a row, of the first row, is stronger.

        Args:
            scores: ``[writers, readers]``; what cannot meet is passed by.
            count: of edges before pruning.
            absolute: whether a score's sign does not count.

        Raises:
            ValueError: more edges than there are, or fewer than none.
        """
        count = check_count(count, self.edge_count, "edges")
        values = (scores.abs() if absolute else scores).masked_fill(~self.edges, -torch.inf)
        kept = torch.zeros(self.writers * self.readers, dtype=torch.bool, device="cpu")
        kept[values.flatten().argsort(descending=True, stable=True)[:count].cpu()] = True
        return self.prune(kept.view(self.writers, self.readers) & self.edges)

    def top_nodes(self, scores: torch.Tensor, count: int, *, absolute: bool = False) -> torch.Tensor:
        """All edges out of the ``count`` strongest writers ``[writers]``, pruned: booleans ``[writers, readers]``.

        Raises:
            ValueError: more writers than there are, or fewer than none.
        """
        count = check_count(count, self.writers, "nodes")
        values = scores.abs() if absolute else scores
        kept = torch.zeros(self.writers, dtype=torch.bool, device="cpu")
        kept[values.argsort(descending=True, stable=True)[:count].cpu()] = True
        return self.prune(self.edges & kept[:, None])

    def prune(self, kept: torch.Tensor) -> torch.Tensor:
        """Edges ``[writers, readers]`` without those that lead nowhere or come from nowhere, until none is left.

        A writer needs an edge out and, but for the input, an edge into one of its readers; an edge needs its writer
        and its reader's. The end needs nothing. What is left does not depend on the order of removals.
        """
        while True:
            nodes = self.nodes(kept)
            readers = (self.feeds & nodes[:, None]).any(0)
            readers[-1] = True
            left = kept & nodes[:, None] & readers
            if torch.equal(left, kept):
                return kept
            kept = left

    def nodes(self, kept: torch.Tensor) -> torch.Tensor:
        """Writers ``[writers]`` that have an edge out and one in."""
        reached = (self.feeds & kept.any(0)).any(1)
        reached[0] = True
        return kept.any(1) & reached
