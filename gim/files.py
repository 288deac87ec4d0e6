"""Files: reading JSON that anybody may have made, and writing in one step, found out to be possible before the work."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl


def read_json(path: str | os.PathLike[str], limit: int) -> Any:
    """The value in a JSON file, in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.

    Args:
        path: the file.
        limit: the most bytes that are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is longer than ``limit``, or not JSON.
    """
    with Path(path).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is longer than {limit:,} bytes")
    try:
        document = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: not text in {error.encoding}: {error.reason}") from error
    return parse_json(str(path), document)


def parse_json(name: str, document: str) -> Any:
    """The value of a JSON text; ``name`` is what to call the text in a message.

    Raises:
        ValueError: not JSON, NaN and infinities included, or nested deeper than Python can follow.
    """
    try:
        return json.loads(document.removeprefix("\ufeff"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is not JSON that can be read: it is nested too deeply") from error


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def check_writable(path: str | os.PathLike[str], argument: str | None = None) -> None:
    """Find out whether a file can be written, by making and deleting a file beside it.

    Args:
        path: the file, which may exist.
        argument: what to call it in the message, such as ``--html``.

    Raises:
        OSError: it cannot be; the message names the argument, the path and the reason.
        TypeError: it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{argument or 'path'} must be a path, got {type(path).__name__}")
    said = f"{argument}: cannot write {path}" if argument else f"cannot write {path}"
    target = Path(path).resolve()
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"{said}: it is a folder")
    if not folder.exists():
        raise FileNotFoundError(f"{said}: folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{said}: {folder} is not a folder")
    if target.exists() and not target.is_file():
        # Replacing a device or a pipe by a file would destroy it.
        raise OSError(f"{said}: it is not an ordinary file")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"{said}: the file is write-protected")
    beside = _beside(target)
    try:
        os.close(_create(beside))
    except OSError as error:
        raise type(error)(f"{said}: {error.strerror or error}") from error
    beside.unlink(missing_ok=True)  # another process's write may have found it first


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """A text, which is also written to a file where there is a path; errors as of :func:`write_atomically`."""
    if path is not None:
        write_atomically(path, text.encode("utf-8"))
    return text


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that its path holds the old content or the new, and never a part.

    The new content is written beside the file first. What a killed process left there is removed by the next write of
    the same file; what another process is writing at the moment is not.

    Args:
        path: the file; a link is followed.
        content: all of its new content.

    Raises:
        OSError: it cannot be written, with the path in the message; the old content is then untouched.
    """
    check_writable(path)
    try:
        _replace(Path(path).resolve(), content)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error


def _replace(target: Path, content: bytes) -> None:
    _remove_leftovers(target)
    beside, descriptor = _create_locked(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                beside.chmod(stat.S_IMODE(target.stat().st_mode))
            if _LOCKS:  # in its place before the lock goes with the descriptor
                beside.replace(target)
        if not _LOCKS:  # where an open file cannot be renamed
            beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


#: Whether a process can lock a file in a way that ends with the process, however that ends.
_LOCKS = sys.platform != "win32"


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writes of this file left beside it: what no living process has locked."""
    if not _LOCKS:
        return  # nothing tells a leftover from another process's write
    for path in target.parent.glob(f"{_stem(target)}*.tmp"):
        # Not ours to remove where it cannot be opened, is locked, or has gone in the meantime.
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def _create_locked(target: Path) -> tuple[Path, int]:
    """A new file beside the target and its descriptor, locked until that is closed."""
    while True:
        beside = _beside(target)
        descriptor = _create(beside)
        try:
            # Between its creation and here another process may have locked it as a leftover, and removed it.
            ours = not _LOCKS or (_lock(descriptor) and os.fstat(descriptor).st_nlink > 0)
        except OSError:
            ours = True  # a file system without locks, on which nothing is taken for a leftover either
        if ours:
            return beside, descriptor
        os.close(descriptor)
        beside.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Whether the lock of an open file could be had; it is held until the descriptor is closed."""
    if sys.platform == "win32":
        raise NotImplementedError("files are not locked on Windows")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stem(target: Path) -> str:
    """How the names of a file's temporary files begin: of one length, for the file's own may be the longest allowed."""
    return f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"


def _beside(target: Path) -> Path:
    """A path in the same folder, hence on the same file system, that nothing else uses."""
    return target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> int:
    """Create a file that must not exist, with the access that the process gives to its files."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
