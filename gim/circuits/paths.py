"""The strongest paths of a circuit from the input to the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gim.circuits.graph import Graph
from gim.targets import counted


@dataclass(frozen=True)
class Path:
    """From the input to the end.

    Args:
        edges: rows and columns of the scores.
        strength: the smallest score on the way, without its sign.
    """

    edges: tuple[tuple[int, int], ...]
    strength: float


def strongest_paths(graph: Graph, scores: torch.Tensor, count: int) -> list[Path]:
    """Paths through the strongest edges, strongest first.

    From each edge, strongest first and without regard to its sign, the strongest edge into its writer is followed to
    the input, and the strongest out of its reader to the end; where only edges of score 0 go on, there is no path. A
    path is as strong as its weakest edge.

    Args:
        graph: of the scores.
        scores: ``[writers, readers]``.
        count: of paths, at most.

    Raises:
        ValueError: ``count`` is no whole number, or none are asked for.
    """
    count = counted("paths", count)
    values = scores.abs().masked_fill(~graph.edges, -1.0)
    owners = graph.feeds.int()
    found: dict[tuple[tuple[int, int], ...], float] = {}
    for place in values.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, graph.readers)
        if len(found) == count or values[row, column] <= 0:
            break
        way, strength = [(row, column)], float(values[row, column])
        while strength > 0 and way[0][0] != 0:
            step, size = _strongest(values * owners[way[0][0]])
            way.insert(0, step)
            strength = min(strength, size)
        while strength > 0 and way[-1][1] != graph.readers - 1:
            # A grouped key head makes several heads; the strongest way on goes through any of them.
            step, size = _strongest(values * owners[:, way[-1][1], None])
            way.append(step)
            strength = min(strength, size)
        if strength > 0:
            found.setdefault(tuple(way), strength)
    return sorted((Path(way, strength) for way, strength in found.items()), key=lambda one: -one.strength)


def _strongest(values: torch.Tensor) -> tuple[tuple[int, int], float]:
    """Row and column of the largest value, and the value."""
    place = int(values.argmax())
    return divmod(place, values.shape[1]), float(values.flatten()[place])
