"""A circuit's strongest paths as one self-contained page."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2

from gim.circuits import drawing
from gim.circuits.drawing import BOX, LINE, THINNEST, Line, Picture, Point
from gim.circuits.graph import BRANCHES
from gim.circuits.paths import Path, strongest_paths
from gim.circuits.result import Circuit

#: What the page says of how a circuit was found, by its name in the settings.
FACTS = {
    "rules_name": "rules",
    "pairs": "pairs",
    "metric": "metric",
    "ig_steps": "points of EAP-IG",
    "weights": "weights",
}


def html(circuit: Circuit, count: int) -> str:
    """The page of a circuit's ``count`` strongest paths."""
    graph = circuit.graph
    paths = strongest_paths(graph, circuit.scores, count)
    picture = Picture(graph, circuit.scores, paths)
    placed = drawing.placed(picture)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("gim").joinpath("templates").joinpath("circuit.html.j2").read_text(encoding="utf-8")
    said = circuit.settings
    return environment.from_string(source).render(
        title=said.get("name", "a model"),
        facts=[("edges", f"{circuit.count:,}")]
        + [(shown, str(said[name])) for name, shown in FACTS.items() if said.get(name)],
        notes=said.get("notes", []),
        size=placed.size,
        # Half of the widest line may stand out.
        margin=LINE,
        box=BOX,
        widest=THINNEST + LINE,
        branches=BRANCHES,
        boxes=[
            {"label": picture.label(box), "name": picture.name(box), "is_head": picture.is_head(box), "x": x, "y": y}
            for box, (x, y) in placed.centres.items()
        ],
        lines=[_drawn(line, curve) for line, curve in zip(picture.lines, placed.curves, strict=True)],
        paths=[{"strength": f"{path.strength:.3g}", "steps": _steps(picture, path)} for path in paths],
    )


def _drawn(line: Line, curve: list[Point]) -> dict[str, Any]:
    start, *others = (f"{x:g} {y:g}" for x, y in curve)
    return {
        "path": f"M{start}C{' '.join(others)}",
        "width": f"{line.width:.2f}",
        "helps": line.score > 0,
        "title": drawing.said(line),
    }


def _steps(picture: Picture, path: Path) -> list[str]:
    """A path in words: where it begins, and what it comes to with which score."""
    lines = {(line.edge, line.reader): line for line in picture.lines}
    found = [picture.label(0)]
    for edge, (_, reader) in zip(path.edges, drawing.boxes(picture.graph, path), strict=True):
        line = lines[edge, reader]
        group = "" if line.group is None else f" of key head {line.group}"
        branch = f" {line.branch}{group}" if line.branch else ""
        found.append(f"{picture.label(reader)}{branch} ({line.score:+.3g})")
    return found
