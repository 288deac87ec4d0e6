"""The command that measures faithfulness, and what the documents make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gim
import gim.demo
from benchmarks import faithfulness, faithfulness_tables, results
from gim.evaluation.tasks import TASKS

ROW: dict[str, Any] = {
    "task": "agreement",
    "model": "m",
    "measure": "logprob",
    "n": 100,
    "mean": 1.0,
    "low": 0.5,
    "high": 1.5,
    "tokens_min": 9,
    "tokens_max": 12,
    "dropped": 3,
}


def row(method: str, metric: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    gap = {"difference": (low + high) / 2, "difference_low": low, "difference_high": high}
    return {**ROW, "method": method, "metric": metric, **gap, **more}


def test_a_verdict_is_that_of_the_whole_interval_and_of_the_metric_s_direction() -> None:
    rows = [
        row("GIM", "comprehensiveness", 0.0, 0.0),
        row("a", "comprehensiveness", -2.0, -1.0),
        row("b", "comprehensiveness", -1.0, 0.1),
        row("c", "comprehensiveness", 0.1, 1.0),
        row("d", "sufficiency", 0.1, 1.0),
        row("e", "comprehensiveness", -2.0, -1.0, measure="logit"),
        {**ROW, "method": "IG:50", "metric": "comprehensiveness"},
    ]
    assert faithfulness_tables.verdicts(rows, "comprehensiveness") == (["a"], ["b"], ["c"])
    assert faithfulness_tables.verdicts(rows, "sufficiency") == (["d"], [], [])
    assert (
        faithfulness_tables.summary(None)
        == faithfulness_tables.tally(None)
        == faithfulness_tables.everything(None)
        == faithfulness_tables.ranks(None)
        == ""
    )
    told = {"rows": rows, "versions": {}, "date": "", "device": "", "commit": "", "not_reached": [], "models": {}}
    counted = faithfulness_tables.tally(told)
    for line in ("| a | 1 / 0 / 0 | 0 / 0 / 0 |", "| c | 0 / 0 / 1 | 0 / 0 / 0 |", "| d | 0 / 0 / 0 | 1 / 0 / 0 |"):
        assert line in counted
    assert all(name in faithfulness_tables.tasks_table() for name in TASKS)


def test_the_plan_is_what_was_asked_for() -> None:
    gradients = [job for job in faithfulness.JOBS if job.part == "gradients" and job.task != "needle"]
    assert len({job.task for job in gradients}) >= 4 and {job.model for job in gradients} == set(faithfulness.MODELS)
    assert all(job.examples >= 100 and {"GIM", "occlusion", "random"} <= set(job.methods) for job in gradients)
    samples = [job for job in faithfulness.JOBS if job.part == "samples"]
    assert all(job.examples >= 50 and {"IG:50", "KernelSHAP"} <= set(job.methods) for job in samples)
    assert [job.examples for job in faithfulness.JOBS if job.task == "needle"] == [20, 20]
    assert len({job.name for job in faithfulness.JOBS}) == len(faithfulness.JOBS)
    assert all("Apache-2.0" in about or "Gemma Terms" in about for about in faithfulness.MODELS.values())


@pytest.mark.slow
def test_the_command_resumes_and_what_it_writes_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gim.demo.model_folder()
    job = faithfulness.Job(folder.name, "facts-in-context", "gradients", ("GIM", "gradient_x_input", "random"), 2)
    short = faithfulness.Job(folder.name, "sentiment", "gradients", ("GIM", "random"), 999)
    monkeypatch.setattr(faithfulness, "MODELS", {folder.name: "the demo model, MIT"})
    monkeypatch.setattr(faithfulness, "JOBS", (job,))
    command = ["--models", str(folder.parent), "--state", str(tmp_path / "state"), "--json", str(tmp_path)]
    assert faithfulness.main(command) == 0
    (written,) = tmp_path.glob("faithfulness-*.json")
    first = results.load(written)
    assert first["complete"] and first["not_reached"] == []
    with monkeypatch.context() as unreachable:  # what is whole in the results is not run again, state or none
        unreachable.setattr(faithfulness, "run", lambda *_: pytest.fail("run again"))
        assert faithfulness.main(command) == 0
    assert results.load(written) == first
    # What is not there is run from where it was left.
    state = (tmp_path / "state" / f"{job.name}.jsonl").read_bytes()
    written.unlink()
    assert faithfulness.main(command) == 0
    assert (tmp_path / "state" / f"{job.name}.jsonl").read_bytes() == state
    assert results.load(written) == first
    assert len(first["rows"]) == 3 * 4 * 2
    assert faithfulness_tables.ranks(first).count(" of 3") == 4
    text = faithfulness_tables.summary(first) + faithfulness_tables.everything(first)
    assert text.count("| random | 2 | ") == 2 and text.count("comprehensiveness, log-probability") == 2
    assert "the demo model, MIT" in text and "-10 added: " in text and "facts-in-context" in text

    # What a model has too few right examples of is left out.
    monkeypatch.setattr(faithfulness, "JOBS", (job, short))
    model, tokenizer = gim.demo.load()
    named: dict[str, Any] = {"methods": job.methods, "grid": "coarse", "measures": faithfulness.MEASURES}
    found = gim.evaluate(model, tokenizer, job.task, limit=2, **named)
    few = gim.evaluate(model, tokenizer, job.task, limit=1, **named)
    monkeypatch.setattr(faithfulness, "run", lambda one, *_: few if one is short else found)
    assert faithfulness.main(command) == 0
    assert results.load(written)["not_reached"] == [short.name]
    assert results.load(written)["complete"] is False


def test_a_constant_moves_ratios_of_logits_and_nothing_else() -> None:
    model, tokenizer = gim.demo.load()
    prompt = gim.demo.make_prompt("shifted", facts=1)
    found = gim.evaluate(
        model, tokenizer, [prompt.text], methods="random", grid="coarse", measures=["logprob", "logit", "contrast"]
    )
    before = found.to_dataframe().set_index(["measure", "metric"])["value"]
    after = faithfulness.shifted(found, 5.0).to_dataframe().set_index(["measure", "metric"])["value"]
    for measure in ("logprob", "contrast"):
        assert before[measure].to_list() == pytest.approx(after[measure].to_list(), rel=1e-9)
    whole = found.records[0]["whole"][0]
    wanted = [value * whole / (whole + 5) for value in before["logit"]]
    assert after["logit"].to_list() == pytest.approx(wanted, rel=1e-9)
