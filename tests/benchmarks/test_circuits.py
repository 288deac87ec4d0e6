"""The command that measures circuits, and what the documents make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import gim.demo
from benchmarks import circuits, circuits_tables, results


def test_the_plan_is_what_was_asked_for() -> None:
    assert len({job.name for job in circuits.JOBS}) == len(circuits.JOBS)
    assert circuits.PAIRS == 50 and len({job.task for job in circuits.JOBS}) == 2
    assert set(circuits.METHODS) == {"GIM", "ATTNLRP", "EAP", "EAP-IG (5)", "GIM_CONSTANT", "random"}
    assert circuits_tables.summary(None) == ""


@pytest.mark.slow
def test_the_command_resumes_and_what_it_writes_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gim.demo.model_folder()
    jobs = tuple(circuits.Job(folder.name, "agreement", method) for method in ("GIM", "random"))
    monkeypatch.setattr(circuits, "MODELS", {folder.name: "the demo model, MIT"})
    monkeypatch.setattr(circuits, "JOBS", jobs)
    command = ["--models", str(folder.parent), "--state", str(tmp_path / "state"), "--json", str(tmp_path)]
    assert circuits.main([*command, "--pairs", "2"]) == 0
    (written,) = tmp_path.glob("circuits-*.json")
    first = results.load(written)
    assert first["complete"] and first["not_reached"] == [] and first["pairs"] == 2
    with monkeypatch.context() as unreachable:
        unreachable.setattr(circuits, "measure", lambda *_: pytest.fail("run again"))
        assert circuits.main([*command, "--pairs", "2"]) == 0
    assert results.load(written) == first
    text = circuits_tables.summary(first)
    assert text.count("| agreement |") == 2 and "MiB" in text
