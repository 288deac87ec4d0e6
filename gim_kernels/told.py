"""What ran: the code that runs an operator says so, and whoever asked for the operator can listen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Heard:
    """The names of the engines that ran while somebody listened, each once, in the order they came."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str) -> None:
        """One more."""
        self._names[name] = None

    def __str__(self) -> str:
        return "+".join(self._names)


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.all: list[Heard] = []


_listeners = _Listeners()


def tell(name: str) -> None:
    """Say that the forward of an operator runs by an engine: its name, and in parentheses what that calls in turn."""
    for heard in _listeners.all:
        heard.add(name)


@contextmanager
def listening() -> Iterator[Heard]:
    """Inside, what engines say on this thread is heard."""
    heard = Heard()
    _listeners.all.append(heard)
    try:
        yield heard
    finally:
        _listeners.all.remove(heard)
