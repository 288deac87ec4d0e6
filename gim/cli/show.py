"""`gim show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.attributions import show, write, write_files
from gim.cli.errors import UserError, check_outputs, handled
from gim.cli.options import Debug, HtmlFile, PngFile, Top

if TYPE_CHECKING:
    from gim.attribution import Attribution
    from gim.cli.attributions import Shown


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


def _read(path: Path) -> Shown:
    from gim import saved
    from gim.answers import AnswerAttribution
    from gim.attribution import Attribution
    from gim.layerwise import LayerwiseAttribution

    kinds: dict[Any, type[Shown]] = {
        saved.ANSWER_SCHEMA: AnswerAttribution,
        saved.LAYERWISE_SCHEMA: LayerwiseAttribution,
    }
    try:
        return kinds.get(str(saved.schema_of(path)), Attribution).from_json(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _compare(first: Shown, second: Shown, outputs: dict[str, Path], top: int) -> None:
    """Two results side by side: the prompts' tokens, of whole answers for those."""
    from rich.console import Console

    from gim.answers import AnswerAttribution
    from gim.layerwise import LayerwiseAttribution
    from gim.report import comparison

    def tokens(found: Shown) -> Attribution:
        if isinstance(found, LayerwiseAttribution):
            return found.attribution
        return found.prompt if isinstance(found, AnswerAttribution) else found

    one, two = tokens(first), tokens(second)
    both = one.compare(two)
    Console().print(comparison.view(both, top=top))
    write_files(outputs, {"--html": lambda path: both.to_html(path, top=max(top, 20))})
