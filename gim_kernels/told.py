"""What ran: the code that runs an operator says so, and whoever asked for the operator can listen."""

from __future__ import annotations

import threading
from typing import Any


class Heard:
    """The names of the engines that run inside it on this thread, each once, in the order they come."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """One more."""
        self._names[name] = None

    def __str__(self) -> str:
        return "+".join(self._names)

    def __enter__(self) -> Heard:
        _listeners.all.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _listeners.all.remove(self)


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.all: list[Heard] = []


_listeners = _Listeners()


def tell(name: str) -> None:
    """Say that the forward of an operator runs by an engine: its name, and in parentheses what that calls in turn."""
    for heard in _listeners.all:
        heard.add(name)


def listening() -> Heard:
    """A context in which what engines say on this thread is heard."""
    return Heard()
