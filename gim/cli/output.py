"""What a command gives: its files first, for they may hold hours of work, and then what it shows."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from gim.cli.errors import UserError


def deliver(
    outputs: Mapping[str, Path], writers: Mapping[str, Callable[[Path], object]], show: Callable[[], object]
) -> None:
    """Write every file that was asked for, then show the result and say what was written.

    A file that cannot be written keeps no other from being written, nor the result from being shown.
    """
    from rich.console import Console
    from rich.text import Text

    written, failures = [], []
    for name, path in outputs.items():
        try:
            writers[name](path)
        except (OSError, ImportError, UserError) as error:
            failures.append(f"{name}: {error}")
        else:
            written.append(path)
    try:
        with showing():
            show()
            for path in written:
                Console().print(Text.assemble(("wrote ", "dim"), str(path)), soft_wrap=True)
    finally:
        if failures:
            raise UserError("; ".join(failures))


@contextmanager
def showing() -> Iterator[None]:
    """Inside, what standard output cannot take is said in one line; a pipe that nobody reads any more ends quietly."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")  # a console's alphabet may lack what a prompt has
    try:
        yield
    except BrokenPipeError:
        raise  # typer's to end, as any command does
    except OSError as error:
        # Python writes what is left of it once more at its end, and would complain again.
        with suppress(OSError), Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        raise UserError(f"cannot write to standard output: {error.strerror or error}") from error
