"""Writing files: found out before the work whether it is possible, and done in one step."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def check_writable(path: str | os.PathLike[str], argument: str = "path") -> None:
    """Find out whether a file can be written, by making and deleting a file beside it.

    Args:
        path: the file, which may exist.
        argument: what to call it in the message, such as ``--html``.

    Raises:
        OSError: it cannot be; the message names the argument, the path and the reason.
    """
    target = Path(path).resolve()
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"{argument}: cannot write {path}: it is a folder")
    if not folder.exists():
        raise FileNotFoundError(f"{argument}: cannot write {path}: folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{argument}: cannot write {path}: {folder} is not a folder")
    if target.exists() and not target.is_file():
        # Replacing a device or a pipe by a file would destroy it.
        raise OSError(f"{argument}: cannot write {path}: it is not an ordinary file")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{argument}: cannot write {path}: the file is write-protected")
    beside = _beside(target)
    try:
        os.close(_create(beside))
    except OSError as error:
        raise type(error)(f"{argument}: cannot write {path}: {error.strerror or error}") from error
    beside.unlink()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that its path holds the old content or the new, and never a part.

    Args:
        path: the file; a link is followed.
        content: all of its new content.

    Raises:
        OSError: it cannot be written; the old content is then untouched.
    """
    check_writable(path)
    target = Path(path).resolve()
    beside = _beside(target)
    try:
        with os.fdopen(_create(beside), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _beside(target: Path) -> Path:
    """A path in the same folder, hence on the same file system, that nothing else uses."""
    return target.with_name(f".{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> int:
    """Create a file that must not exist, with the access that the process gives to its files."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
