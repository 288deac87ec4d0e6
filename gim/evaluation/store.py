"""Finished examples on disk: a line of JSON each, after one that says what they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gim.evaluation.measures import Record
from gim.files import check_writable, write_atomically

SCHEMA = 2


class Store:
    """A file that a run adds each finished example to, and that another run of the same goes on from.

    Args:
        path: the file; made where it is missing.
        settings: what the examples depend on. A file with other settings is refused, and left as it is.
        digests: of each example that will be evaluated, in order.

    Raises:
        ValueError: a file that is none of these, or of another model, rules, versions or data; names what differs.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], digests: Sequence[str]) -> None:
        check_writable(path, "resume")
        self.path = Path(path)
        self.records: dict[int, Record] = {}
        header = self._header = {"schema": SCHEMA, **json.loads(json.dumps(settings))}
        if not self.path.exists() or self.path.stat().st_size == 0:
            write_atomically(self.path, _line(header))
            return
        content = self.path.read_bytes()
        # What a killed run wrote of its last line has no end.
        whole = content[: content.rfind(b"\n") + 1]
        lines = [self._parsed(line, number) for number, line in enumerate(whole.splitlines(), start=1)]
        self._check(lines[0] if lines else {}, header)
        self._header = lines[0]
        for number, record in enumerate(lines[1:], start=2):
            self._check_record(record, digests)
            if record.pop("sum", None) != _sum(self._header, record):
                raise ValueError(f"resume: line {number} of {self.path} is not as it was written; take it out")
            self.records[record["example"]] = record
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def add(self, record: Record) -> None:
        """Keep one more example, on the disk before this returns.

        Raises:
            OSError: it cannot be written, such as on a full disk; what was there stays.
        """
        before = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(_line({**record, "sum": _sum(self._header, record)}))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with self.path.open("rb+") as file:
                file.truncate(before)
            raise type(error)(
                error.errno,
                f"resume: cannot add example {record['example']}: {error.strerror or error}; the {len(self.records)} "
                "examples before it are kept",
                str(self.path),
            ) from error
        self.records[record["example"]] = record

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"resume: line {number} of {self.path} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"resume: line {number} of {self.path} is not an object of JSON")
        return found

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if "schema" not in found:
            raise ValueError(f"resume: {self.path} is no file of an evaluation")
        for name, value in wanted.items():
            if found.get(name) != value:
                there, here = _apart(found.get(name), value)
                raise ValueError(
                    f"resume: {self.path} was made with other {name}: {_short(there)} there, {_short(here)} here; give "
                    "another file to start anew"
                )

    def _check_record(self, record: Record, digests: Sequence[str]) -> None:
        example = record.get("example")
        if not isinstance(example, int) or not 0 <= example < len(digests):
            raise ValueError(
                f"resume: {self.path} was made with other data: it holds example {example} of {len(digests)}"
            )
        if record.get("digest") != digests[example]:
            raise ValueError(f"resume: {self.path} was made with other data: example {example} is another one")


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, separators=(",", ":")) + "\n").encode("ascii")


def _sum(header: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """By which a finished example is known to be what was written, under that header, whatever it holds."""
    return hashlib.sha256(_line(header) + _line(record)).hexdigest()[:16]


def _apart(there: Any, here: Any) -> tuple[Any, Any]:
    """Two values, or of two lists or mappings what is not in the other."""
    if isinstance(there, list) and isinstance(here, list):
        apart = [one for one in there if one not in here], [one for one in here if one not in there]
        return apart if any(apart) else (there, here)
    if isinstance(there, dict) and isinstance(here, dict):
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        return {name: there.get(name) for name in names}, {name: here.get(name) for name in names}
    return there, here


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 120 else f"{value!r:.117}..."
