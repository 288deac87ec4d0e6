"""A picture of paths: its boxes and lines, and where they lie, which graphviz says where it is installed.

The input is below and the end on top. Heads of one layer stand in a row, and its MLP in the row above, or in the same
one where the two read the same.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gim.circuits.graph import BRANCHES, Graph
from gim.circuits.paths import Path
from gim.evaluation.extras import need

if TYPE_CHECKING:
    import pygraphviz

#: In pixels: a box, and what is free between rows and between the boxes of one, where lines have to pass.
BOX, ABOVE, BESIDE = (84, 36), 38, 42
#: The widest line, what is added to every line, and how far lines side by side are apart, at most.
LINE, THINNEST, APART = 9.0, 0.8, 9.0
#: Of graphviz, which counts in inches and finds its own ways: pixels of one, and what is free between boxes.
INCH, FREE = 72, 16
#: Of lines that help and that harm: for graphviz's own pictures, on white paper.
COLOURS = ("#3b82c4", "#d1494b")

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One edge as it is drawn.

    Args:
        edge: row and column of the scores.
        name: the same in EAP-IG's words.
        reader: the box that it goes to, by the row of a writer; the end is the row after the last.
        branch: where a head reads, ``q``, ``k`` or ``v``; empty where nothing of that kind does.
        group: the key head whose k or v it is, where those are grouped.
        score: of the edge.
        width: in pixels.
    """

    edge: tuple[int, int]
    name: str
    reader: int
    branch: str
    group: int | None
    score: float
    width: float

    @property
    def writer(self) -> int:
        """The box that it comes from."""
        return self.edge[0]


@dataclass(frozen=True)
class Placed:
    """Where a picture's parts lie, in pixels from the upper left.

    Args:
        size: of the whole.
        centres: of the boxes.
        curves: of each line, from its writer to its reader: points of Bézier curves, one and three for each.
    """

    size: Point
    centres: dict[int, Point]
    curves: list[list[Point]]


class Picture:
    """What is drawn of paths.

    Args:
        graph: of the scores.
        scores: ``[writers, readers]``.
        paths: of this graph.
    """

    def __init__(self, graph: Graph, scores: torch.Tensor, paths: Sequence[Path]) -> None:
        self.graph = graph
        found = {
            (edge, ways[1]): None for path in paths for edge, ways in zip(path.edges, boxes(graph, path), strict=True)
        }
        largest = max((abs(float(scores[edge])) for edge, _ in found), default=1.0)
        #: Strongest first, so that thin lines lie above wide ones.
        self.lines = sorted(
            (self._line(edge, reader, float(scores[edge]), largest) for edge, reader in found),
            key=lambda one: -abs(one.score),
        )
        levels: dict[int, set[int]] = {}
        for box in {end for line in self.lines for end in (line.writer, line.reader)}:
            levels.setdefault(self._level(box), set()).add(box)
        #: Boxes by row, from below.
        self.rows = [sorted(levels[level]) for level in sorted(levels)]

    def label(self, box: int) -> str:
        """``head 3.5`` for the sixth head of the fourth layer, ``MLP 7``, ``input``, ``logits``."""
        if box in (0, self.graph.writers):
            return self.name(box)
        layer, place = divmod(box - 1, self.graph.heads + 1)
        return f"MLP {layer}" if place == self.graph.heads else f"head {layer}.{place}"

    def name(self, box: int) -> str:
        """The same in EAP-IG's words."""
        return "logits" if box == self.graph.writers else self.graph.writer_names[box]

    def is_head(self, box: int) -> bool:
        """Whether it reads by q, k and v."""
        return self.label(box).startswith("head")

    def _level(self, box: int) -> int:
        if box == 0:
            return -1
        layer, place = divmod(box - 1, self.graph.heads + 1)
        return 2 * layer + (place == self.graph.heads and not self.graph.parallel)

    def _line(self, edge: tuple[int, int], reader: int, score: float, largest: float) -> Line:
        graph, name = self.graph, self.graph.reader_names[edge[1]]
        branch = name.partition("<")[2].rstrip(">")
        group = None
        if graph.groups is not None and branch in ("k", "v"):
            group = (reader - 1) % (graph.heads + 1) * graph.groups // graph.heads
        width = THINNEST + LINE * abs(score) / largest
        return Line(edge, f"{graph.writer_names[edge[0]]}->{name}", reader, branch, group, score, width)


def boxes(graph: Graph, path: Path) -> list[tuple[int, int]]:
    """From which box to which each edge of a path goes: a reader is the next writer, whichever head of a group that is.

    Args:
        graph: of the path.
        path: any.
    """
    rows = [row for row, _ in path.edges]
    return list(itertools.pairwise([*rows, graph.writers]))


def placed(picture: Picture) -> Placed:
    """Where everything lies: by graphviz where it is installed, else in rows."""
    try:
        need("pygraphviz", "graphviz")
    except ImportError:
        return in_rows(picture)
    return by_graphviz(picture)


# -------------------------------------------------------------------------------------------------------- graphviz


def graphviz(picture: Picture) -> pygraphviz.AGraph:
    """What :meth:`gim.circuits.Circuit.to_graphviz` gives."""
    found = _ranked(picture, dict(zip(BRANCHES, BRANCHES, strict=True)))
    found.node_attr.update(shape="box", style="rounded", fontname="Helvetica", fontsize=11, height=0.3, margin=0.05)
    for box in itertools.chain(*picture.rows):
        label = picture.label(box)
        if picture.is_head(box):
            found.get_node(picture.name(box)).attr.update(
                shape="record", style="", label=f"{{{label}|{{{'|'.join(f'<{one}>{one}' for one in BRANCHES)}}}}}"
            )
        else:
            found.get_node(picture.name(box)).attr["label"] = label
    for key, line in enumerate(picture.lines):
        _edge(found, picture, line, key).attr.update(
            color=COLOURS[line.score < 0], style="dashed" if line.score < 0 else "solid",
            penwidth=f"{line.width:.2f}", tooltip=said(line), score=f"{line.score:.6g}",
        )  # fmt: skip
    return found


def said(line: Line) -> str:
    """A line in words."""
    return f"{line.name}: {line.score:+.4g}"


def by_graphviz(picture: Picture) -> Placed:
    """Where graphviz places boxes and lines. Words are drawn by others, so that it needs no fonts."""
    with closing(_ranked(picture, {"q": "sw", "k": "s", "v": "se"})) as graph:
        graph.graph_attr.update(nodesep=FREE / INCH, ranksep=ABOVE / INCH)
        graph.node_attr.update(shape="box", fixedsize=True, label="", width=BOX[0] / INCH, height=BOX[1] / INCH)
        graph.layout("dot")
        width, height = (float(one) for one in graph.graph_attr["bb"].split(",")[2:])
        centres = {box: graph.get_node(picture.name(box)).attr["pos"] for box in itertools.chain(*picture.rows)}
        curves = [_edge(graph, picture, line, key).attr["pos"].split() for key, line in enumerate(picture.lines)]

    def point(text: str) -> Point:
        x, y = map(float, text.split(","))
        return round(x, 1), round(height - y, 1)  # which is counted from below

    return Placed(
        (width, height), {box: point(one) for box, one in centres.items()}, [list(map(point, one)) for one in curves]
    )


def _ranked(picture: Picture, ports: dict[str, str]) -> Any:
    """The boxes in their rows and the lines between them, each with its place as its key."""
    found = need("pygraphviz", "graphviz").AGraph(directed=True, strict=False, rankdir="BT")
    found.edge_attr["arrowhead"] = "none"
    names = [[picture.name(box) for box in row] for row in picture.rows]
    for number, row in enumerate(names):
        found.add_nodes_from(row)
        found.add_subgraph(row, name=f"row {number}", rank="same")
    for below, above in itertools.pairwise(names):  # so that a row is above another with which it shares no line
        found.add_edge(below[0], above[0], key="rows", style="invis", weight=0)
    for key, line in enumerate(picture.lines):
        found.add_edge(picture.name(line.writer), picture.name(line.reader), key=str(key))
        if line.branch:
            _edge(found, picture, line, key).attr["headport"] = ports[line.branch]
    return found


def _edge(graph: Any, picture: Picture, line: Line, key: int) -> Any:
    return graph.get_edge(picture.name(line.writer), picture.name(line.reader), key=str(key))


# ------------------------------------------------------------------------------------------------------------ rows


#: Where lines pass: its middle, and how wide it is.
Stop = tuple[float, float, float]


def in_rows(picture: Picture) -> Placed:
    """Boxes in rows, each row in the middle, and lines that pass between the boxes of the rows on their way."""
    widest = max((len(row) for row in picture.rows), default=0)
    column, row_height = BOX[0] + BESIDE, BOX[1] + ABOVE
    size = (widest * column + BESIDE, len(picture.rows) * row_height)
    heights = [size[1] - (number + 0.5) * row_height for number in range(len(picture.rows))]
    centres: dict[int, Point] = {}
    level: dict[int, int] = {}
    for number, several in enumerate(picture.rows):
        for place, box in enumerate(several):
            centres[box] = (size[0] / 2 + (place - (len(several) - 1) / 2) * column, heights[number])
            level[box] = number
    ways: list[list[Stop]] = []
    taken: Counter[tuple[int, float]] = Counter()
    for line in picture.lines:
        (x, y), (end, up) = centres[line.writer], centres[line.reader]
        ways.append([(x, y - BOX[1] / 2, BOX[0])])
        for row in range(level[line.writer] + 1, level[line.reader]):
            straight = x + (end - x) / (level[line.reader] - row + 1)
            gaps = {abs(gap - straight) + APART * taken[row, gap]: gap for gap in _gaps(picture.rows[row], centres)}
            x = gaps[min(gaps)]
            taken[row, x] += 1
            ways[-1].append((x, heights[row], BESIDE))
        shift = {"q": -0.5, "v": 0.5}.get(line.branch, 0.0) * BOX[0]
        ways[-1].append((end + shift, up + BOX[1] / 2, 0 if line.branch else BOX[0]))
    return Placed(size, centres, [_curve(way) for way in _apart(ways)])


def _gaps(row: Sequence[int], centres: dict[int, Point]) -> list[float]:
    """The middles of what is left free beside the boxes of a row."""
    step = (BOX[0] + BESIDE) / 2
    return [centres[row[0]][0] - step, *(centres[box][0] + step for box in row)]


def _apart(ways: Sequence[Sequence[Stop]]) -> list[list[Point]]:
    """Lines side by side where several have the same stop, in the order of where they come from and go to."""
    meeting: dict[Stop, list[tuple[float, int]]] = {}
    for number, way in enumerate(ways):
        for before, stop, after in zip([way[0], *way], way, [*way[1:], way[-1]], strict=False):
            meeting.setdefault(stop, []).append((before[0] + after[0], number))
    found: list[dict[Stop, Point]] = [{} for _ in ways]
    for stop, several in meeting.items():
        step = min(APART, stop[2] / len(several))
        for place, (_, number) in enumerate(sorted(several)):
            found[number][stop] = (stop[0] + (place - (len(several) - 1) / 2) * step, stop[1])
    return [[points[stop] for stop in way] for way, points in zip(ways, found, strict=True)]


def _curve(way: Sequence[Point]) -> list[Point]:
    """Upright at both ends, and beside every box that it passes."""
    half = BOX[1] / 2
    stops = [way[0], *((x, y + side * half) for x, y in way[1:-1] for side in (1, -1)), way[-1]]
    found = [way[0]]
    for (x, y), (to, up) in itertools.pairwise(stops):
        middle = (y + up) / 2
        found += [(x, middle), (to, middle), (to, up)]
    return [(round(x, 1), round(y, 1)) for x, y in found]
