"""`gim show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gim.cli.attributions import show, write, write_files
from gim.cli.errors import UserError, check_outputs, handled
from gim.cli.options import Debug, HtmlFile, PngFile, Top

if TYPE_CHECKING:
    from gim.answers import AnswerAttribution
    from gim.attribution import Attribution


def command(
    results: Annotated[list[Path], typer.Argument(help="Files that --json wrote.")],
    html: HtmlFile = None,
    png: PngFile = None,
    top: Top = 10,
    debug: Debug = False,
) -> None:
    """Show attributions that were written as JSON, one after another; one of them as a page or a picture.

    With --html two are compared on one page, word by word: of other rules, another model or another prompt.
    """
    with handled(debug):
        outputs = check_outputs({"--html": html, "--png": png}, [("results", path) for path in results])
        if png is not None and len(results) > 1:
            raise UserError(f"--png is for one result, got {len(results)} of them")
        if html is not None and len(results) > 2:
            raise UserError(f"--html is for one result, or for two compared, got {len(results)} of them")
        found = [_read(path) for path in results]
        for attribution in found:
            show(attribution, top)
        if len(found) == 2 and outputs:
            _compare(found[0], found[1], outputs, top)
        else:
            write(found[0], outputs, top)


def _read(path: Path) -> Attribution | AnswerAttribution:
    from gim import saved
    from gim.answers import AnswerAttribution
    from gim.attribution import Attribution

    try:
        kind = AnswerAttribution if saved.is_answer(path) else Attribution
        return kind.from_json(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _compare(
    first: Attribution | AnswerAttribution, second: Attribution | AnswerAttribution, outputs: dict[str, Path], top: int
) -> None:
    """Two results side by side; of whole answers, what their prompts have for them."""
    from rich.console import Console

    from gim.attribution import Attribution
    from gim.report import comparison

    one, two = (found if isinstance(found, Attribution) else found.prompt for found in (first, second))
    both = one.compare(two)
    Console().print(comparison.view(both, top=top))
    write_files(outputs, {"--html": lambda path: both.to_html(path, top=max(top, 20))})
