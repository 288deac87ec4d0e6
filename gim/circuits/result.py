"""A circuit: the scores of every edge or node, what they were made of, and what can be made of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from gim.circuits.curve import MIB_SIZES, Curve
from gim.circuits.graph import Graph, check_count
from gim.circuits.metrics import Metric

if TYPE_CHECKING:
    import networkx
    import pandas as pd
    import pygraphviz

    from gim.circuits.pairs import Pair


class Edge(NamedTuple):
    """One edge, in EAP-IG's names.

    Args:
        writer: such as ``input``, ``a0.h1`` or ``m2``.
        reader: such as ``a1.h0<q>``, ``m2`` or ``logits``.
        score: what the metric would lose without it; positive where it helps.
    """

    writer: str
    reader: str
    score: float


class Circuit:
    """Scores of edges, or of nodes.

    Args:
        graph: whose writers and readers.
        scores: float64, ``[writers, readers]`` of edges, 0 where they cannot meet; ``[writers]`` of nodes.
        settings: what they were made of: model, rules, level, metric, pairs, versions, notes.
        model, tokenizer, metric: those it was found with, which files do not hold.
    """

    def __init__(
        self,
        graph: Graph,
        scores: torch.Tensor,
        settings: Mapping[str, Any],
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        metric: Metric | None = None,
    ) -> None:
        self.graph = graph
        self.scores = scores
        self.settings = dict(settings)
        self._model, self._tokenizer, self._metric = model, tokenizer, metric

    def __repr__(self) -> str:
        said = self.settings
        notes = "".join(f"; {note}" for note in said.get("notes", ()))
        return (
            f"Circuit({self.count:,} {self.level}s of {said.get('name', 'a model')}, {said.get('pairs', '?')} pairs, "
            f"{said.get('rules_name', 'rules not known')}{notes})"
        )

    @property
    def level(self) -> str:
        """``"edge"`` or ``"node"``."""
        return "edge" if self.scores.dim() == 2 else "node"

    @property
    def count(self) -> int:
        """How many edges, or nodes, are scored."""
        return self.graph.edge_count if self.level == "edge" else self.graph.writers

    @property
    def digest(self) -> str:
        """What tells these scores from others."""
        content = self.scores.double().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(repr(self.graph).encode() + content).hexdigest()[:16]

    # -- numbers

    def kept(self, n: int, *, absolute: bool = False) -> torch.Tensor:
        """The circuit of the ``n`` strongest edges, or of all edges of the ``n`` strongest nodes, pruned.

        Edges that lead nowhere or come from nowhere are left out until none is left, as in MIB.

        Args:
            n: before pruning.
            absolute: whether a score's sign does not count.

        Returns:
            Booleans ``[writers, readers]``.

        Raises:
            ValueError: ``n`` is more than there are.
        """
        choose = self.graph.top if self.level == "edge" else self.graph.top_nodes
        return choose(self.scores, n, absolute=absolute)

    def top(self, n: int, absolute: bool = False) -> list[Edge]:
        """The ``n`` strongest edges, strongest first, as they are scored; nothing is pruned.

        Raises:
            ValueError: the scores are of nodes, or ``n`` is below 1 or more than there are edges.
        """
        self._need_edges("top")
        n = check_count(n, self.count, "edges", least=1)
        values = (self.scores.abs() if absolute else self.scores).masked_fill(~self.graph.edges, -torch.inf)
        places = values.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [self._edge(*divmod(place, self.graph.readers)) for place in places]

    def top_nodes(self, n: int, absolute: bool = False) -> list[tuple[str, float]]:
        """The ``n`` strongest writers and their scores; of edges, the sum over each one's.

        Raises:
            ValueError: ``n`` is below 1 or more than there are writers.
        """
        n = check_count(n, self.graph.writers, "nodes", least=1)
        scores = self.scores if self.level == "node" else self.scores.sum(1)
        places = (scores.abs() if absolute else scores).argsort(descending=True, stable=True)[:n].tolist()
        return [(self.graph.writer_names[place], float(scores[place])) for place in places]

    def to_dataframe(self) -> pd.DataFrame:
        """Columns ``writer``, ``reader`` and ``score`` of every edge; of nodes ``writer`` and ``score``."""
        from gim.circuits import export

        return export.dataframe(self)

    # -- faithfulness

    def faithfulness(
        self,
        pairs: Iterable[Pair] | str | os.PathLike[str],
        sizes: Sequence[float] = MIB_SIZES,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        **named: Any,
    ) -> Curve:
        """How much of the metric circuits of every size keep on other pairs, by patching edges.

        Every reader of the residual stream sees its own mix: what its kept edges carry now, and what all others carried
        on the corrupted prompt. With every edge kept that is the model itself, with none the corrupted run. Circuits
        are taken in two orders, by signed score for :attr:`Curve.cpr` and by absolute score for :attr:`Curve.cmd`.

        Args:
            pairs: as in :func:`gim.circuits.attribute`; not those the circuit was found on.
            sizes: shares of all edges, or nodes; MIB's by default.
            model, tokenizer: those it was found with where None; a circuit from a file has none.
            named: ``metric``, ``batch_tokens``, ``progress``, ``engine``, ``limit`` and ``seed`` as in
                :func:`gim.circuits.attribute`; ``skip``, pairs of a task that are left out first; ``resume``, a file
                that keeps each finished pair.

        Returns:
            The curve, with bootstrap intervals over pairs.

        Raises:
            ValueError: there is no model, or its writers and readers are others; the metric does not differ between
                clean and corrupted prompts.
            ImportError: scipy is missing.
            CurveInterrupted: Ctrl-C; what is finished is in its ``curve``.
        """
        from gim.circuits.run import faithfulness

        model = self._model if model is None else model
        if model is None:
            raise ValueError("a circuit from a file has no model: give model=, and tokenizer= for texts")
        named.setdefault("metric", self._metric)
        if named["metric"] is None:
            del named["metric"]
        return faithfulness(
            self, model, pairs, tokenizer=self._tokenizer if tokenizer is None else tokenizer, sizes=sizes, **named
        )

    # -- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every score as Parquet, in one step, with the graph and the settings in the file's metadata.

        Args:
            path: ``.parquet``.

        Raises:
            ValueError: another ending.
            OSError: the file cannot be written.
            ImportError: pyarrow is missing.
        """
        from gim.circuits import export

        export.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """The circuit of a file that :meth:`save` or :meth:`to_mib` wrote, or EAP-IG: ``.parquet``, ``.json``, ``.pt``.

        No code that comes with a file is run.

        Raises:
            ValueError: it is none of these.
            OSError: it cannot be read.
        """
        from gim.circuits import export

        return export.load(path)

    def to_mib(self, path: str | os.PathLike[str], n: int | None = None, *, absolute: bool = False) -> None:
        """Write the circuit in the exchange format of EAP-IG and MIB: JSON, or a ``.pt`` of tensors alone.

        Args:
            path: ``.json`` or ``.pt``.
            n: which edges are ``in_graph``: those of :meth:`kept`; None for all.
            absolute: as in :meth:`kept`.

        Raises:
            ValueError: another ending, or k and v are grouped, which the format has no place for.
            OSError: the file cannot be written.
        """
        from gim.circuits import export

        export.to_mib(self, path, n, absolute=absolute)

    def to_networkx(self, n: int | None = None, *, absolute: bool = False) -> networkx.DiGraph:
        """The kept edges as a directed graph of nodes, q, k and v apart.

        Args:
            n, absolute: as in :meth:`kept`; None for all edges.

        Returns:
            Nodes ``input``, ``a0.h1``, ``m2``, ``logits``; a ``MultiDiGraph`` whose edges are keyed ``q``, ``k``, ``v``
            or ``in`` and have a ``score`` (0 where nodes were scored, which then have it).

        Raises:
            ImportError: networkx is missing.
        """
        from gim.circuits import export

        return export.to_networkx(self, n, absolute=absolute)

    def to_graphviz(self, *, paths: int = 12) -> pygraphviz.AGraph:
        """The strongest paths from the input to the end, as graphviz draws them: ``.draw("circuit.pdf", prog="dot")``.

        Args:
            paths: how many, at most.

        Returns:
            Nodes ``input``, ``a0.h1``, ``m2``, ``logits``, labelled in words; edges with a ``score``, as wide as it is
            large, dashed where it is negative, into the port ``q``, ``k`` or ``v`` of a head.

        Raises:
            ValueError: the scores are of nodes, or no path is asked for.
            ImportError: pygraphviz is missing.
        """
        from gim.circuits import drawing
        from gim.circuits.paths import strongest_paths

        self._need_edges("to_graphviz")
        found = strongest_paths(self.graph, self.scores, paths)
        return drawing.graphviz(drawing.Picture(self.graph, self.scores, found))

    def to_html(self, path: str | os.PathLike[str] | None = None, *, paths: int = 12) -> str:
        """The strongest paths from the input to the end as a self-contained page that loads nothing.

        Graphviz says where boxes and lines lie if pygraphviz is installed; without it they stand in rows.

        Args:
            path: a file to write it to as well, in one step.
            paths: how many are drawn, at most.

        Returns:
            The page.

        Raises:
            ValueError: the scores are of nodes, or no path is asked for.
            OSError: the file cannot be written.
        """
        from gim.circuits import page
        from gim.files import written

        self._need_edges("to_html")
        return written(page.html(self, paths), path)

    # -- inside

    def _edge(self, row: int, column: int) -> Edge:
        return Edge(self.graph.writer_names[row], self.graph.reader_names[column], float(self.scores[row, column]))

    def _need_edges(self, what: str) -> None:
        if self.level != "edge":
            raise ValueError(
                f"{what} needs scores of edges, and these are of nodes: find the circuit with level='edge'"
            )
