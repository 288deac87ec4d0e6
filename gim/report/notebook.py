"""An attribution as a piece of HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from gim.report.facts import answer_facts, method_facts, uncovered
from gim.report.html import attribute, environment, level_class
from gim.report.pieces import Piece, context, excerpts, pieces
from gim.report.scale import DARK, LIGHT, Scale
from gim.report.text import number, visible

if TYPE_CHECKING:
    from gim.attribution import Attribution

# A notebook output stays small: beyond this only the strongest sentences are shown.
MOST_TOKENS = 1000


def cell(attribution: Attribution, before: Markup | None = None, after: Markup | None = None) -> str:
    """A piece of HTML for a notebook: facts, the strongest tokens and the text, with styles that stay inside.

    Args:
        attribution: what to show.
        before, after: HTML to stand above the text and below it.

    Returns:
        HTML without a script; of a long prompt it has the strongest sentences only.
    """
    scale = Scale.of(attribution)
    scores, aside = attribution.scores.tolist(), attribution.aside

    def marked(part: Sequence[Piece]) -> Markup:
        shown = []
        for piece in part:
            text = str(escape(visible(piece.text))).replace("\n", "\u21b5\n")
            if piece.position is None:
                shown.append(text)
                continue
            name = "s" if aside[piece.position] else level_class(scale.level(scores[piece.position]))
            title = f' title="{number(scores[piece.position])}"'
            shown.append(f"<span{attribute('class', name)}{title}>{text}</span>")
        return Markup("".join(shown))

    everything = list(pieces(attribution))
    if len(attribution) <= MOST_TOKENS:
        parts = [marked(everything)]
    else:
        parts = [marked(part) for part in excerpts(attribution, everything, 8, 200)]
    ramps = {
        name: [
            (f"{side}{level}", colour)
            for side, positive in (("p", True), ("n", False))
            for level, colour in enumerate(theme.ramp(positive), start=1)
        ]
        for name, theme in (("light", LIGHT), ("dark", DARK))
    }
    return (
        environment()
        .get_template("notebook.html.j2")
        .render(
            answer=answer_facts(attribution),
            facts=method_facts(attribution)[:3],
            warnings=uncovered(attribution),
            light=LIGHT,
            dark=DARK,
            ramps=ramps,
            scale=scale,
            before=before,
            after=after,
            parts=parts,
            is_whole=len(attribution) <= MOST_TOKENS,
            count=len(attribution),
            ranked=[(token, context(attribution, token, 30)) for token in attribution.top(10)],
        )
    )
