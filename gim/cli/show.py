"""`gim show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gim.cli.attributions import show, writers
from gim.cli.errors import UserError, check_outputs, handled
from gim.cli.options import Debug, HtmlFile, PngFile, Top
from gim.cli.output import deliver

if TYPE_CHECKING:
    from gim.attribution import Attribution
    from gim.cli.attributions import Shown
    from gim.comparison import Comparison


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
        both = _compared(*found) if len(found) == 2 and outputs else None

        def shown() -> None:
            for attribution in found:
                show(attribution, top)
            if both is not None:
                from rich.console import Console

                from gim.report import comparison

                Console().print(comparison.view(both, top=top))

        page = {} if both is None else {"--html": lambda path: both.to_html(path, top=max(top, 20))}
        deliver(outputs, page or writers(found[0], top), shown)


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


def _compared(first: Shown, second: Shown) -> Comparison:
    """Two results side by side: the prompts' tokens, of whole answers for those."""
    from gim.answers import AnswerAttribution
    from gim.layerwise import LayerwiseAttribution

    def tokens(found: Shown) -> Attribution:
        if isinstance(found, LayerwiseAttribution):
            return found.attribution
        return found.prompt if isinstance(found, AnswerAttribution) else found

    return tokens(first).compare(tokens(second))
