"""The committed census is what a census here finds, and a part that no rule reaches makes a class refused."""

from __future__ import annotations

import re

import pytest
import transformers

from benchmarks import coverage
from benchmarks.census import build, examine
from gim.intercept import fused, products
from gim.intercept.mode import HANDLERS

#: One of each kind: every status, latent attention, experts, chunks, sinks, cross attention left out, no interface.
SAMPLE = [
    "bart",
    "bloom",
    "cohere",
    "deepseek_v3",
    "doge",
    "exaone4",
    "jamba",
    "lfm2",
    "llama4_text",
    "mamba",
    "opt",
    "seed_oss",
]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_census_is_current(model_type: str) -> None:
    committed = coverage.census()
    (row,) = [row for row in committed["rows"] if row["model_type"] == model_type]
    found = examine(model_type)
    if transformers.__version__ == committed["transformers"]:
        assert found.status == row["status"], found.reason
        assert found.model_class == row["model_class"]
    assert found.status in ("covered", "refused"), found.reason


def test_at_least_three_in_five_are_covered_and_none_in_part() -> None:
    rows = coverage.census()["rows"]
    built = [row for row in rows if row["status"] != "not built"]
    assert sum(row["status"] == "covered" for row in built) >= 0.6 * len(built)
    assert not [row for row in rows if row["status"] == "partial"]


def test_a_rule_that_is_left_out_makes_a_class_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ENABLED", False)
    for function in products.PRODUCTS:
        monkeypatch.delitem(HANDLERS, function)
    row = examine("llama")
    assert row.status == "refused" and re.search(r"model\.layers\.0\.input_layernorm: norm \(", row.reason), row.reason


def test_every_kind_of_layer_is_built() -> None:
    assert set(build("llama4_text").config.layer_types) == {"chunked_attention", "full_attention"}
