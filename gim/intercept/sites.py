"""What a rule has reached: the one thing that whatever applies rules tells the watch.

A *site* is a place in a model's code where a rule acts. Code that applies a rule either runs its own operators inside
:meth:`Sites.acting`, or marks a tensor that the model's code goes on with: a branch whose gradient is scaled, a
statistic that is detached. Both are of one thread, and hold nothing alive.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gim.applied import Part


class Sites(threading.local):
    """Which rule acts now in this thread, and which tensors a rule has given back."""

    def __init__(self) -> None:
        self._acting: list[Part] = []

    @contextmanager
    def acting(self, rule: Part) -> Iterator[None]:
        """Inside, operators are those of a rule: what they compute of its part is reached."""
        self._acting.append(rule)
        try:
            yield
        finally:
            self._acting.pop()

    def acts(self, rule: Part) -> bool:
        """Whether code of this rule runs now."""
        return rule in self._acting


#: The sites of each thread. They say nothing outside a watched forward pass.
SITES = Sites()
