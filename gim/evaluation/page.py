"""An evaluation as one self-contained page: every table with its intervals, every curve."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from gim.evaluation.extras import need
from gim.evaluation.measures import HIGHER_IS_BETTER

if TYPE_CHECKING:
    import pandas as pd

    from gim.evaluation.result import Evaluation

#: Colours of the methods in their order, legible on white and on near black; then again, dashed and dotted.
COLOURS = ("#3b82c4", "#e07b1a", "#2fa36b", "#d1494b", "#8e6cc0", "#9a7b4f", "#d65fa8", "#7d8590", "#a39a1f", "#1fa6b5")
DASHES = ("-", "--", ":")
#: Stands for the page's own text colour in a picture.
INK = "#010203"
#: Width and height of a picture in inches, at 72 units each.
PICTURE = (5.2, 2.9)

MEASURED = {
    "logprob": "log-probability",
    "logit": "logit",
    "logodds": "log-odds",
    "contrast": "logit of the target minus that of the foil",
}
NAMED = {
    "comprehensiveness": "Comprehensiveness",
    "sufficiency": "Sufficiency",
    "loo_correlation": "Correlation with leaving one out",
}
ASKS = {
    "comprehensiveness": "what goes when the highest scores are replaced",
    "sufficiency": "what goes when the lowest scores are replaced",
    "loo_correlation": "correlation of the scores with leaving each token out",
}


def html(evaluation: Evaluation, reference: str) -> str:
    """The page.

    Args:
        evaluation: what was found.
        reference: the method that the others are compared with.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a reference that is no method.
    """
    need("matplotlib.figure")
    looks = {
        name: (COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)])
        for index, name in enumerate(evaluation.methods)
    }
    curves = evaluation.curves()
    parts = []
    for (measure, metric), rows in evaluation.table(reference).groupby(["measure", "metric"], sort=False):
        drawn = curves[(curves["measure"] == measure) & (curves["metric"] == metric)]
        parts.append(
            {
                "measure": MEASURED[measure],
                "metric": NAMED[metric],
                "asks": ASKS[metric],
                "better": "higher" if HIGHER_IS_BETTER[metric] else "lower",
                "rows": rows.to_dict("records"),
                "picture": Markup(_picture(drawn, looks, metric, measure)) if len(drawn) else "",
            }
        )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    source = resources.files("gim").joinpath("templates").joinpath("evaluation.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        facts=_facts(evaluation), parts=parts, looks=looks, reference=reference, settings=evaluation.settings
    )


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    said = evaluation.settings
    tokens = evaluation.examples()["tokens"]
    return [
        ("model", f"{said['name']}, weights {said['weights']}, {said['dtype']}"),
        ("examples", f"{len(evaluation)}, {evaluation.dropped} more dropped, which the model had wrong"),
        ("tokens", f"{tokens.min()} to {tokens.max()}"),
        (
            "protocol",
            f"{said['protocol']}, grid {said['grid']}, baseline token {said['baseline']}, seed {said['seed']}",
        ),
        ("versions", ", ".join(f"{name} {number}" for name, number in said["versions"].items())),
    ]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}"  # NaN: few examples have no interval


def _picture(curves: pd.DataFrame, looks: Mapping[str, tuple[str, str]], metric: str, measure: str) -> str:
    """One line for each method, as SVG in the page's own colours."""
    matplotlib: Any = need("matplotlib")
    figure = need("matplotlib.figure").Figure(figsize=PICTURE, layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.groupby("method", sort=False):
        colour, dash = looks[name]
        axes.plot(rows["replaced"], rows["drop"], dash, color=colour, marker=".", linewidth=1.6)
    axes.set_xlabel("tokens replaced" if metric == "comprehensiveness" else "share of the tokens replaced", color=INK)
    axes.set_ylabel("1 - f / f(x)" if measure == "logit" else "f(x) - f", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    for side in axes.spines.values():
        side.set_color(INK)
        side.set_alpha(0.4)
    out = io.StringIO()
    # Text stays text; ids differ from those of the page's other pictures, and are the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{metric} {measure}", "font.size": 10}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*pt" height="[^"]*pt"|^<svg ', r'<svg role="img" \1', svg, count=1)
