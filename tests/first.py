"""What of a proof the fast suite takes: the rest is marked slow, for the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], now: Collection[Any] | Callable[..., bool]) -> list[Any]:
    """Values to parametrize a test by, of which all but those ``now`` are marked slow.

    Args:
        values: the values; a tuple has one for each name.
        now: those that the fast suite takes, or what tells whether it takes one.
    """
    every = [one if isinstance(one, tuple) else (one,) for one in values]
    if not callable(now):
        chosen = {one if isinstance(one, tuple) else (one,) for one in now}
        assert chosen <= {*every}, f"no values: {chosen - {*every}}"
    marks = [[] if (now(*one) if callable(now) else one in chosen) else [pytest.mark.slow] for one in every]
    return [pytest.param(*one, marks=mark) for one, mark in zip(every, marks, strict=True)]
