"""What a user can put right is said in one line; what is wrong with their files, before anything runs."""

from __future__ import annotations

import importlib.util
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


class UserError(Exception):
    """Something the user can put right: shown in one line, without a traceback."""


def check_texts(texts: dict[str, str | None]) -> None:
    for name, text in texts.items():
        if text == "":
            raise UserError(f"{name} must not be empty")


def check_outputs(
    outputs: dict[str, Path | None], inputs: Iterable[tuple[str, str | Path | None]] = ()
) -> dict[str, Path]:
    """The files to write, after it is known that they can be, and are none of those that are read, by their options."""
    from gim.files import check_writable

    wanted = {name: path for name, path in outputs.items() if path is not None}
    seen = {Path(path).resolve(): name for name, path in inputs if path is not None}
    for name, path in wanted.items():
        try:
            check_writable(path, name)
        except OSError as error:
            raise UserError(str(error)) from error
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise UserError(f"{name}: {path} is the file of {other} too")
    if "--png" in wanted and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--png: a picture needs matplotlib: pip install gim-kernels[report]")
    return wanted


def check_parquet(name: str, path: Path | None) -> None:
    """Refuse another ending before hours of work, which could not be written under it."""
    if path is not None and path.suffix != ".parquet":
        raise UserError(f"{name}: must end in .parquet, got {path}")


@contextmanager
def handled(debug: bool) -> Iterator[None]:
    """Inside, an error of the user's becomes one line and exit code 2, and warnings one line each at the end."""
    from rich.console import Console

    err = Console(stderr=True)
    failure: UserError | None = None
    with warnings.catch_warnings(record=not debug) as caught:
        try:
            yield
        except UserError as error:
            failure = error
            if debug:
                traceback.print_exc()
    for message in dict.fromkeys(str(warning.message) for warning in caught or []):
        _line(err, "warning:", "yellow", message)
    if failure is not None:
        _line(err, "error:", "bold red", str(failure))
        raise typer.Exit(2)


@contextmanager
def refused() -> Iterator[None]:
    """Inside, what the library refuses is the user's to put right; any other error is not."""
    import torch

    from gim.applied import UnsupportedModelError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(str(error)) from error
    except (ValueError, FloatingPointError, NotImplementedError, UnsupportedModelError) as error:
        raise UserError(": ".join([*getattr(error, "__notes__", ()), str(error)])) from error


def _line(console: Console, word: str, style: str, message: str) -> None:
    """One line, however the message was laid out, with nothing in it that a terminal would obey."""
    from rich.text import Text

    from gim.report.text import one_line

    text = Text.assemble((word, style), " ", one_line(" ".join(message.split())))
    with suppress(OSError):  # of a console that takes nothing, which cannot be said there either
        console.print(text, soft_wrap=True)
