"""Circuits on real models: `python -m benchmarks.circuits --models DIR --state DIR`, or `make circuits`.

Every job is one model on one task with one method: edges are scored on some pairs, and circuits of MIB's sizes are
measured on others. What is finished is kept in the folder of the state, and the same command goes on from there. A job
that is whole is written to `benchmarks/results` and not run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.faithfulness import MODELS, load
from benchmarks.jobs import Jobs
from benchmarks.measure import peak_bytes
from gim import circuits
from gim.circuits import Circuit, Curve
from gim.circuits.curve import ORDERS
from gim.evaluation import tasks
from gim.files import write_atomically

#: Rules and points of EAP-IG by the name of a method; None for scores that are drawn.
METHODS: dict[str, tuple[str, int | None] | None] = {
    "GIM": ("GIM", None),
    "ATTNLRP": ("ATTNLRP", None),
    "EAP": ("GRADIENT", None),
    "EAP-IG (5)": ("GRADIENT", 5),
    "GIM_CONSTANT": ("GIM_CONSTANT", None),
    "random": None,
}
TASKS = ("indirect-objects", "agreement")
#: Pairs that edges are scored on, and as many others that circuits are measured on.
PAIRS = 50
#: Pairs that a method's time is told by.
TIMED = 8
SEED = 0


@dataclass(frozen=True)
class Job:
    """One model on one task with one method; names of each."""

    model: str
    task: str
    method: str

    @property
    def name(self) -> str:
        """Of the files that keep what is finished."""
        return f"{self.model}.{self.task}.{''.join(c for c in self.method if c.isalnum() or c in '_-')}"


JOBS = tuple(Job(model, task, method) for model in MODELS for task in TASKS for method in METHODS)


def find(job: Job, model: Any, tokenizer: Any, pairs: int, state: Path) -> Circuit:
    """The circuit of a job, from where it was left."""
    kept = state / f"{job.name}.parquet"
    if kept.exists():
        return Circuit.load(kept)
    chosen = METHODS[job.method]
    if chosen is None:
        reference = find(Job(job.model, job.task, "GIM"), model, tokenizer, pairs, state)
        drawn = torch.rand(reference.scores.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        found = Circuit(reference.graph, drawn * reference.graph.edges, {})
    else:
        found = circuits.attribute(
            model, job.task, tokenizer=tokenizer, rules=chosen[0], ig_steps=chosen[1], limit=pairs, seed=SEED,
            resume=state / f"{job.name}.safetensors", progress=_progress(f"{job.name} find"),
        )  # fmt: skip
    found.save(kept)
    return found


def cost(job: Job, model: Any, tokenizer: Any, state: Path) -> dict[str, float]:
    """Seconds of the process for each pair beyond the first, and MiB beyond the weights for one pair."""
    chosen, kept = METHODS[job.method], state / f"{job.name}.cost.json"
    if chosen is None:
        return {}
    if not kept.exists():

        def run(pairs: int) -> None:
            circuits.attribute(
                model, job.task, tokenizer=tokenizer, rules=chosen[0], ig_steps=chosen[1], limit=pairs, seed=SEED
            )

        seconds = []
        peak = peak_bytes(lambda: run(1))
        for pairs in (1, TIMED):
            start = time.process_time()
            run(pairs)
            seconds.append(time.process_time() - start)
        found = {"seconds_a_pair": (seconds[1] - seconds[0]) / (TIMED - 1), "peak_mib": peak / 2**20}
        write_atomically(kept, json.dumps(found).encode())
    return dict(json.loads(kept.read_text()))


def measure(job: Job, found: Circuit, model: Any, tokenizer: Any, pairs: int, state: Path) -> Curve:
    """The curve of a job, from where it was left."""
    return found.faithfulness(
        job.task, model=model, tokenizer=tokenizer, limit=pairs, skip=pairs, seed=SEED,
        resume=state / f"{job.name}.jsonl", progress=_progress(f"{job.name} score"),
    )  # fmt: skip


def _progress(what: str) -> Any:
    def say(done: int, total: int, left: float | None) -> None:
        remaining = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
        sys.stderr.write(f"{what}: {done} of {total}{remaining}\n")

    return say


def row(job: Job, found: Circuit, curve: Curve, spent: dict[str, float]) -> dict[str, Any]:
    """What is written of a job."""

    def rounded(one: Any) -> dict[str, Any]:
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(one).items()}

    points = curve.points
    return {
        "case": f"{job.model} {job.task} {job.method}",
        **asdict(job),
        "edges": found.count,
        "clean": round(curve.clean, 5),
        "corrupted": round(curve.corrupted, 5),
        "cpr": rounded(curve.cpr),
        "cmd": rounded(curve.cmd),
        **{order: [rounded(one) for one in points if one.order == order] for order in ORDERS},
        **{name: round(value, 3) for name, value in spent.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing; write what is whole."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuits", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder that holds the models' folders")
    parser.add_argument("--state", type=Path, required=True, help="folder that keeps what is finished")
    parser.add_argument("--json", type=Path, default=Path(results.__file__).parent / "results", help="for the results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="jobs whose model, task and method hold this text")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="for each of the two purposes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.state.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", message="gim.circuits: the softmax is constant")  # it is what is measured
    loaded: tuple[str, Any] = ("", None)
    jobs = Jobs(options.json, "circuits", [job.name for job in JOBS], conditions(options.pairs))
    for job in JOBS:
        if options.only not in job.name or job.name in jobs.read()["jobs"]:
            continue
        if loaded[0] != job.model:
            loaded = job.model, load(options.models / job.model)
        model, tokenizer = loaded[1]
        found = find(job, model, tokenizer, options.pairs, options.state)
        curve = measure(job, found, model, tokenizer, options.pairs, options.state)
        jobs.add(job.name, [row(job, found, curve, cost(job, model, tokenizer, options.state))])
    return 0


def conditions(pairs: int) -> dict[str, Any]:
    """What the numbers depend on beside the job."""
    return {
        "pairs": pairs,
        "seed": SEED,
        "models": MODELS,
        "tasks": {name: tasks.TASKS[name].source for name in TASKS},
    }


if __name__ == "__main__":
    raise SystemExit(main())
