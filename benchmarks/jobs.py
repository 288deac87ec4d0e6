"""Results that are reached job by job, over days and machines: a job that a results file holds is not run again."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.measure import commit, device_name
from gim.evaluation import fingerprint


class Jobs:
    """The results of a suite of jobs. A row carries the name of its ``job``; ``jobs`` in the file says of each on which
    day and by which commit it was run, and what is kept with it.

    Args:
        folder: that holds results files.
        suite: name of the suite.
        plan: names of all jobs.
        conditions: what the numbers depend on beside the job, written into the file. Of the files with these
            conditions, versions and device the newest goes on; the others are left alone.
    """

    def __init__(self, folder: Path, suite: str, plan: Sequence[str], conditions: Mapping[str, Any]) -> None:
        self.folder = folder
        self.plan = tuple(plan)
        self.header: results.Results = {
            "schema": results.SCHEMA,
            "suite": suite,
            "device": device_name(torch.device("cpu")),
            "versions": fingerprint.versions(),
            "machine": None,
            **conditions,
        }

    def read(self) -> results.Results:
        """The newest results so far."""
        found = [results.load(path) for path in self.folder.glob(f"{self.header['suite']}-*.json")]
        alike = [one for one in found if all(one.get(name) == value for name, value in self.header.items())]
        return max(alike, key=lambda one: one["date"], default={"jobs": {}, "rows": []})

    def add(self, job: str, rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any] | None = None) -> Path:
        """Write a job that is whole beside the others.

        Args:
            job: its name.
            rows: what was measured.
            about: what is kept with the job.

        Returns:
            The file, named by today's date.
        """
        before = self.read()
        today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        jobs = {**before["jobs"], job: {"commit": commit(), "date": today, **(about or {})}}
        every = [row for row in before["rows"] if row["job"] != job] + [{"job": job, **row} for row in rows]
        done = [name for name in self.plan if name in jobs]
        found: results.Results = {
            **self.header,
            "commit": ", ".join(dict.fromkeys(jobs[name]["commit"] for name in done)),
            "date": today,
            "complete": len(done) == len(self.plan),
            "not_reached": [name for name in self.plan if name not in jobs],
            "jobs": {name: jobs[name] for name in done},
            "rows": [row for name in done for row in every if row["job"] == name],
        }
        path = self.folder / results.default_name(found)
        results.save(path, found)
        return path
