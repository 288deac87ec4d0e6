"""What hypothesis draws hangs on its seed, and on nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

#: Constants of a module that nobody would draw by chance.
CONSTANTS = "ONE, TWO, THREE = 918273645, 0.1234567890123, 'a text of nobody else'\n"


def draws(number: int, examples: int = 300) -> list[Any]:
    """What a test with this seed is given."""
    found: list[Any] = []

    @seed(number)
    @settings(max_examples=examples)
    @given(st.integers(), st.floats(allow_nan=False), st.text())
    def collect(whole: int, real: float, text: str) -> None:
        found.append((whole, real, text))

    collect()
    return found


def test_an_imported_module_changes_no_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = draws(0)
    (tmp_path / "constants_of_ones_own.py").write_text(CONSTANTS)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("constants_of_ones_own")
    after = draws(0)
    assert after == before
    assert draws(1) != before


def test_every_run_has_a_seed(request: pytest.FixtureRequest) -> None:
    assert request.config.option.hypothesis_seed is not None
    assert not settings().derandomize and settings().database is None
