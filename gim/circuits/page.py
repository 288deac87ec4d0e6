"""A circuit's strongest paths as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import torch

from gim.circuits.graph import Graph
from gim.circuits.result import Circuit

#: Sizes of the drawing.
ROW, COLUMN, BOX, EDGE = 64, 92, (72, 26), 9.0


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
    """
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


def html(circuit: Circuit, count: int) -> str:
    """The page of a circuit's ``count`` strongest paths."""
    graph = circuit.graph
    paths = strongest_paths(graph, circuit.scores, count)
    edges = sorted({edge for path in paths for edge in path.edges}, key=lambda edge: -abs(float(circuit.scores[edge])))
    places, width, height = _layout(graph, edges)
    largest = max((abs(float(circuit.scores[edge])) for edge in edges), default=1.0)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("gim").joinpath("templates").joinpath("circuit.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=circuit.settings.get("name", "a model"),
        facts=_facts(circuit),
        notes=circuit.settings.get("notes", []),
        size=(width, height),
        box=BOX,
        nodes=[{"name": name, "x": x, "y": y} for name, (x, y) in places.items()],
        edges=[_drawn(graph, places, edge, float(circuit.scores[edge]), largest) for edge in edges],
        paths=[
            {
                "strength": f"{path.strength:.3g}",
                "steps": [graph.writer_names[path.edges[0][0]]]
                + [
                    f"{graph.reader_names[column]} ({float(circuit.scores[row, column]):+.3g})"
                    for row, column in path.edges
                ],
            }
            for path in paths
        ],
    )


def _facts(circuit: Circuit) -> list[tuple[str, str]]:
    said = circuit.settings
    facts = [("edges", f"{circuit.count:,}")]
    facts += [
        (name, str(said[name])) for name in ("rules_name", "pairs", "metric", "ig_steps", "weights") if said.get(name)
    ]
    return [(name.replace("_", " "), value) for name, value in facts]


def _node(graph: Graph, column: int) -> str:
    return graph.reader_names[column].partition("<")[0]


def _layout(graph: Graph, edges: Sequence[tuple[int, int]]) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Where each node is: the input below, heads and MLP of a layer above those of the layer before, the end on top."""
    names = {graph.writer_names[row] for row, _ in edges} | {_node(graph, column) for _, column in edges}
    rows: dict[float, list[str]] = {}
    for name in names:
        layer = name.lstrip("am").partition(".")[0]
        level = -1.0 if name == "input" else float(graph.layers) if name == "logits" else float(layer)
        rows.setdefault(level + (0.5 if name.startswith("m") else 0.0), []).append(name)
    widest = max((len(row) for row in rows.values()), default=1)
    width, height = (widest + 0.4) * COLUMN, (len(rows) + 0.4) * ROW
    places = {}
    for step, level in enumerate(sorted(rows)):
        several = sorted(rows[level], key=lambda name: (len(name), name))
        for place, name in enumerate(several):
            x = width / 2 + (place - (len(several) - 1) / 2) * COLUMN
            places[name] = (round(x, 1), round(height - (step + 0.7) * ROW, 1))
    return places, round(width, 1), round(height, 1)


def _drawn(
    graph: Graph, places: dict[str, tuple[float, float]], edge: tuple[int, int], score: float, largest: float
) -> dict[str, Any]:
    """One edge: a curve from the top of its writer to the bottom of its reader."""
    writer, reader = graph.writer_names[edge[0]], graph.reader_names[edge[1]]
    (x, y), (to_x, to_y) = places[writer], places[_node(graph, edge[1])]
    y, to_y = y - BOX[1] / 2, to_y + BOX[1] / 2
    bend = max(ROW / 3, (y - to_y) / 2)
    branch = reader.partition("<")[2].rstrip(">")
    # q, k and v of one head end side by side.
    to_x += {"q": -20, "k": 0, "v": 20}.get(branch, 0)
    return {
        "path": f"M{x} {y:.1f}C{x} {y - bend:.1f} {to_x} {to_y + bend:.1f} {to_x} {to_y:.1f}",
        "width": f"{0.8 + EDGE * abs(score) / largest:.2f}",
        "helps": score > 0,
        "branch": branch,
        "x": to_x,
        "y": round(to_y + 10, 1),
        "title": f"{writer} -> {reader}: {score:+.4g}",
    }
