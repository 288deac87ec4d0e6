"""`gim show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gim.cli.attributions import show, write
from gim.cli.errors import UserError, check_outputs, handled
from gim.cli.options import Debug, HtmlFile, PngFile, Top


def command(
    results: Annotated[list[Path], typer.Argument(help="Files that --json wrote.")],
    html: HtmlFile = None,
    png: PngFile = None,
    top: Top = 10,
    debug: Debug = False,
) -> None:
    """Show attributions that were written as JSON, one after another; one of them as a page or a picture."""
    with handled(debug):
        outputs = check_outputs({"--html": html, "--png": png})
        if outputs and len(results) > 1:
            raise UserError(f"{next(iter(outputs))} is for one result, got {len(results)} of them")
        from gim import saved
        from gim.answers import AnswerAttribution
        from gim.attribution import Attribution

        for path in results:
            try:
                kind = AnswerAttribution if saved.is_answer(path) else Attribution
                attribution = kind.from_json(path)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror or error}") from error
            except ValueError as error:
                raise UserError(str(error)) from error
            show(attribution, top)
            write(attribution, outputs, top)
