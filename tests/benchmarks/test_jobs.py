"""Results that are reached job by job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.jobs import Jobs


def test_jobs_of_other_days_are_kept_and_those_measured_otherwise_are_left_alone(tmp_path: Path) -> None:
    def jobs(**conditions: Any) -> Jobs:
        return Jobs(tmp_path, "some", ["a", "b", "c"], conditions)

    path = jobs(seed=0).add("b", [{"value": 1.0}], {"order": [1]})
    older = results.load(path)
    older["date"] = "2026-01-01"
    older["jobs"]["b"].update(commit="earlier", date="2026-01-01")
    path.unlink()
    results.save(tmp_path / "some-device-2026-01-01.json", older)

    today = results.load(jobs(seed=0).add("a", [{"value": 2.0}, {"value": 3.0}]))
    assert [(row["job"], row["value"]) for row in today["rows"]] == [("a", 2.0), ("a", 3.0), ("b", 1.0)]
    assert today["not_reached"] == ["c"] and today["complete"] is False
    assert today["jobs"]["b"] == {"commit": "earlier", "date": "2026-01-01", "order": [1]}
    assert today["commit"] == f"{today['jobs']['a']['commit']}, earlier"
    assert results.load(tmp_path / "some-device-2026-01-01.json") == older

    # A job that is measured again replaces its rows, and only those.
    again = results.load(jobs(seed=0).add("b", [{"value": 4.0}]))
    assert [row["value"] for row in again["rows"]] == [2.0, 3.0, 4.0] and "order" not in again["jobs"]["b"]
    assert results.load(jobs(seed=0).add("c", []))["complete"] is True

    assert jobs(seed=1).read()["jobs"] == {}
