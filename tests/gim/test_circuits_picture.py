"""The strongest paths and the picture of them: what it says, and that a person can tell its parts from each other."""

from __future__ import annotations

import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from gim.circuits import Circuit, Graph, drawing
from gim.circuits.drawing import BOX, Picture, Placed, Point
from gim.circuits.paths import strongest_paths

GRAPHS = {
    "in turn": Graph(4, 3, False, 8),
    "parallel": Graph(3, 4, True, 8),
    "grouped": Graph(3, 4, False, 8, 2),
}
LAYOUTS = {"graphviz": drawing.by_graphviz, "rows": drawing.in_rows}


def drawn(name: str) -> Circuit:
    """A circuit whose scores are drawn."""
    graph = GRAPHS[name]
    scores = torch.randn(graph.writers, graph.readers, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Circuit(graph, scores * graph.edges, {"name": name, "pairs": 3})


def picture(name: str, paths: int = 12) -> Picture:
    circuit = drawn(name)
    return Picture(circuit.graph, circuit.scores, strongest_paths(circuit.graph, circuit.scores, paths))


def test_strongest_paths_follow_the_strongest_edges() -> None:
    graph = Graph(1, 1, False, 8)  # writers input, a0.h0, m0; readers q, k, v, m0, logits
    scores = torch.tensor([[0.1, 0.2, -3.0, 1.0, 0.3], [0, 0, 0, -2.0, 0.5], [0, 0, 0, 0, 4.0]], dtype=torch.float64)
    first, second = strongest_paths(graph, scores, 2)
    # Through a0.h0 by v, to m0 and out; then input to m0.
    assert first.edges == ((0, 2), (1, 3), (2, 4)) and first.strength == 2.0
    assert second.edges == ((0, 3), (2, 4)) and second.strength == 1.0
    # What a0.h0 reads goes no further, and nothing goes into m0: there is one path, straight to the end.
    ends = torch.tensor([[0, 0, -3.0, 0, 0.3], [0, 0, 0, 0, 0], [0, 0, 0, 0, 4.0]], dtype=torch.float64)
    assert [(one.edges, one.strength) for one in strongest_paths(graph, ends, 5)] == [(((0, 4),), 0.3)]
    assert strongest_paths(graph, torch.zeros(3, 5), 5) == []
    for count in (0, True, 1.0):
        with pytest.raises(ValueError, match="paths must be a whole number >= 1, got"):
            strongest_paths(graph, scores, count)


def test_a_picture_has_the_edges_of_its_paths_between_the_boxes_they_lead_to() -> None:
    graph = Graph(2, 4, False, 8, 2)
    scores = torch.zeros(graph.writers, graph.readers, dtype=torch.float64)
    names = {name: place for place, name in enumerate(graph.reader_names)}
    # By the second key head of the second layer, which feeds heads 2 and 3, to the end by head 3.
    scores[graph.writer_names.index("m0"), names["a1.g1<k>"]] = -2.0
    scores[0, names["m0"]], scores[graph.writer_names.index("a1.h3"), names["logits"]] = 4.0, 1.0
    (path,) = strongest_paths(graph, scores, 5)
    found = Picture(graph, scores, [path, path])
    assert [[found.label(box) for box in row] for row in found.rows] == [["input"], ["MLP 0"], ["head 1.3"], ["logits"]]
    assert [(line.name, found.label(line.reader), line.branch, line.group, line.score) for line in found.lines] == [
        ("input->m0", "MLP 0", "", None, 4.0),
        ("m0->a1.g1<k>", "head 1.3", "k", 1, -2.0),
        ("a1.h3->logits", "logits", "", None, 1.0),
    ]
    widths = [line.width - drawing.THINNEST for line in found.lines]
    assert widths == pytest.approx([drawing.LINE, drawing.LINE / 2, drawing.LINE / 4])
    text = Circuit(graph, scores, {}).to_html()
    assert "input → MLP 0 (+4) → head 1.3 k of key head 1 (-2) → logits (+1)" in text


def along(curve: list[Point]) -> list[Point]:
    """Points of Bézier curves, one after another, by De Casteljau's construction."""
    found = []
    for start in range(0, len(curve) - 1, 3):
        for step in range(21):
            points = curve[start : start + 4]
            while len(points) > 1:
                points = [
                    (a + (c - a) * step / 20, b + (d - b) * step / 20) for (a, b), (c, d) in itertools.pairwise(points)
                ]
            found += points
    return found


def inside(point: Point, centre: Point, margin: float) -> bool:
    return all(abs(a - b) < size / 2 + margin for a, b, size in zip(point, centre, BOX, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GRAPHS)
def test_lines_meet_their_boxes_and_no_others(name: str, layout: str) -> None:
    found = picture(name)
    placed: Placed = LAYOUTS[layout](found)
    centres = placed.centres
    assert len(placed.curves) == len(found.lines) >= 20 and set(centres) == {box for row in found.rows for box in row}
    for x, y in centres.values():
        assert BOX[0] / 2 <= x <= placed.size[0] - BOX[0] / 2 and BOX[1] / 2 <= y <= placed.size[1] - BOX[1] / 2
    for one, other in itertools.combinations(centres.values(), 2):
        assert abs(one[0] - other[0]) >= BOX[0] or abs(one[1] - other[1]) >= BOX[1]
    for below, above in itertools.pairwise(found.rows):
        assert len({centres[box][1] for box in below}) == 1 and centres[below[0]][1] > centres[above[0]][1]
    for line, curve in zip(found.lines, placed.curves, strict=True):
        # Graphviz lets a line end up to a pixel beside its box, and pass a corner that close.
        points = along(curve)
        assert inside(points[0], centres[line.writer], 1.5) and inside(points[-1], centres[line.reader], 1.5)
        others = [centre for box, centre in centres.items() if box not in (line.writer, line.reader)]
        assert not any(inside(point, centre, -1) for point in points for centre in others), line
        if line.branch:  # at the lower left, in the middle of the lower side, at the lower right
            x, y = (a - b for a, b in zip(points[-1], centres[line.reader], strict=True))
            assert y == pytest.approx(BOX[1] / 2, abs=1.5)
            assert x == pytest.approx({"q": -BOX[0] / 2, "k": 0, "v": BOX[0] / 2}[line.branch], abs=1.5)


class Words(HTMLParser):
    """Everything that a page says, in order, without where it stands."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.said += [data.strip()] if data.strip() else []


@pytest.mark.parametrize("name", GRAPHS)
def test_without_graphviz_a_page_says_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = drawn(name)
    text = circuit.to_html(tmp_path / "page.html", paths=5)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text and text.count("<tr><td>") == 5
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    without = circuit.to_html(paths=5)
    assert Words(without).said == Words(text).said and without != text
    with pytest.raises(ImportError, match=r"to_graphviz needs pygraphviz: pip install 'gim-kernels\[graphviz\]'"):
        circuit.to_graphviz()
    for one in (text, without):
        assert "http" not in one.replace("http-equiv", "") and "<script" not in one
        scores = {float(score) for score in re.findall(r"<title>[^<]*: ([+-].*)</title>", one)}
        assert scores == {float(f"{line.score:.4g}") for line in picture(name, 5).lines}
        harmful = len(re.findall(r'<path class="harms" d="M\d', one))
        assert harmful == 1 + sum(line.score < 0 for line in picture(name, 5).lines)  # and the legend's
        assert re.search(r"path.harms {[^}]*stroke: [^}]*stroke-dasharray", one)  # by colour, and without it


def test_a_page_escapes_what_others_wrote() -> None:
    circuit = drawn("in turn")
    circuit.settings |= {"name": "<b>&", "metric": "<i>", "notes": ["<u>"]}
    text = circuit.to_html()
    assert "&lt;b&gt;&amp;" in text and not any(tag in text for tag in ("<b>", "<i>", "<u>"))


def test_a_circuit_without_paths_says_so() -> None:
    graph = GRAPHS["parallel"]
    text = Circuit(graph, torch.zeros(graph.writers, graph.readers), {}).to_html()
    assert "every way from the input to the end has an edge of score 0" in text and "<path" not in text
    with pytest.raises(ValueError, match="to_graphviz needs scores of edges"):
        Circuit(graph, torch.zeros(graph.writers), {}).to_graphviz()


def test_graphviz_draws_the_paths() -> None:
    want = picture("in turn")
    graph = drawn("in turn").to_graphviz()
    edges = [edge for edge in graph.edges(keys=True) if edge[2] != "rows"]
    assert len(edges) == len(want.lines) and len(graph.nodes()) == sum(map(len, want.rows))
    for line in want.lines:
        (attributes,) = (
            found for writer, reader, key in edges
            for found in [graph.get_edge(writer, reader, key).attr] if found["tooltip"].startswith(f"{line.name}: ")
        )  # fmt: skip
        assert (attributes["headport"] or "") == line.branch
        assert (attributes["style"] == "dashed") == (line.score < 0)
        assert float(attributes["score"]) == pytest.approx(line.score, rel=1e-5)
        assert float(attributes["penwidth"]) == pytest.approx(line.width, abs=0.01)
    svg = ElementTree.fromstring(graph.draw(format="svg", prog="dot"))
    said = {one.text for one in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert said == {want.label(box) for row in want.rows for box in row} | {"q", "k", "v"}
