"""What holds after every test of the package."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch._dynamo import eval_frame


@pytest.fixture(autouse=True)
def no_session_stays_open() -> Iterator[None]:
    """An open session keeps torch's stance, and with it compiled code of every model, from being torch's own."""
    yield
    if type(eval_frame._stance) is not eval_frame.DynamoStance:
        gc.collect()  # a context that a test has dropped closes with it
        assert type(eval_frame._stance) is eval_frame.DynamoStance, "the test left a session open"
