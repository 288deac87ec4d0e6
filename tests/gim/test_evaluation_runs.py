"""Evaluations that are interrupted, gone on with, refused, saved, drawn, and asked for from the command line."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import gim
import gim.demo
from gim import cli
from gim.evaluation import fingerprint, tasks

PROMPT = "The password of {0} is {1}. The password of {0} is"
DATA = [(PROMPT.format(name, word), f" {word}") for name, word in (("Irene", "lantern"), ("Otto", "camel"))]
ASKED: dict[str, Any] = {"methods": ("random", "attention"), "grid": "coarse", "measures": ("logprob", "logit")}


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return gim.demo.load()


def interrupted(demo: Any, path: Path) -> gim.EvaluationInterrupted:
    def stop(done: int, total: int, left: float | None) -> None:
        assert total == 2 and (left is None) == (done == 0)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(gim.EvaluationInterrupted) as caught:
        gim.evaluate(*demo, DATA, resume=path, progress=stop, **ASKED)
    return caught.value


def test_what_was_finished_is_kept_and_gone_on_from(demo: Any, tmp_path: Path) -> None:
    whole = gim.evaluate(*demo, DATA, **ASKED).to_dataframe()
    path = tmp_path / "state.jsonl"
    found = interrupted(demo, path).evaluation
    assert found is not None and len(found) == 1
    pd.testing.assert_frame_equal(found.to_dataframe(), whole[whole["example"] == 0])
    # A line that a killed run has begun is as good as none.
    with path.open("ab") as file:
        file.write(b'{"example": 1, "whole": [1.0')
    asked = []

    def watch(ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        return ids

    gone_on = gim.evaluate(*demo, DATA, resume=path, **ASKED)
    pd.testing.assert_frame_equal(gone_on.to_dataframe(), whole)
    again = gim.evaluate(*demo, DATA, resume=path, **ASKED)
    pd.testing.assert_frame_equal(again.to_dataframe(), whole)
    assert len(path.read_bytes().splitlines()) == 3
    gim.evaluate(*demo, DATA, resume=tmp_path / "other", **{**ASKED, "methods": watch})
    gim.evaluate(*demo, DATA, resume=tmp_path / "other", **{**ASKED, "methods": watch})
    assert len(asked) == 2


@pytest.mark.parametrize(
    "what", ["weights", "methods", "grid", "baseline", "seed", "versions", "data", "order", "junk"]
)
def test_going_on_with_something_else_is_refused_and_leaves_the_file_alone(
    demo: Any, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "state.jsonl"
    interrupted(demo, path)
    model, tokenizer = demo
    asked, rows, named = dict(ASKED), list(DATA), what
    if what == "weights":
        model = copy.deepcopy(model)
        model.get_input_embeddings().weight.data[-1, -1] += 1e-3
    elif what == "methods":
        asked["methods"] = ("random", "attention", gim.rules.GIM)
    elif what == "grid":
        asked["grid"] = "full"
    elif what == "versions":
        path.write_text(path.read_text().replace('"torch":"', '"torch":"9.'))
    elif what == "data":
        rows, named = [(rows[1][0], rows[1][1])], "other data: example 0 is another one"
    elif what == "order":
        path.write_text(path.read_text().replace('"example":0', '"example":2'))
        named = "other data: it holds example 2 of 2"
    else:
        path.write_text("a list of shopping\n")
        named = "line 1 of .* is not JSON"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"resume: .*{named}"):
        gim.evaluate(model, tokenizer, rows, resume=path, **asked)
    assert path.read_bytes() == before


def test_a_line_that_is_not_as_it_was_written_is_named(demo: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    interrupted(demo, path)
    head, line = path.read_text().splitlines()
    record = json.loads(line)
    for changed in (
        {name: value for name, value in record.items() if name != "whole"},
        record | {"whole": [*record["whole"][:3], record["whole"][3] + 1e-9]},
        record | {"methods": {}},
        {name: value for name, value in record.items() if name != "sum"},
    ):
        path.write_text(f"{head}\n{json.dumps(changed)}\n")
        with pytest.raises(ValueError, match="resume: line 2 of .* is not as it was written"):
            gim.evaluate(*demo, DATA, resume=path, **ASKED)


def test_a_line_of_another_run_is_named(demo: Any, tmp_path: Path) -> None:
    path, other = tmp_path / "state.jsonl", tmp_path / "other.jsonl"
    interrupted(demo, path)
    model = copy.deepcopy(demo[0])
    model.get_input_embeddings().weight.data[-1, -1] += 1e-3
    interrupted((model, demo[1]), other)
    # As when two runs, of which neither found a file, began one: both write their examples after the head of one.
    head, line = path.read_text().splitlines()[0], other.read_text().splitlines()[1]
    path.write_text(f"{head}\n{line}\n")
    with pytest.raises(ValueError, match="resume: line 2 of .* is not as it was written"):
        gim.evaluate(*demo, DATA, resume=path, **ASKED)


def test_a_full_disk_keeps_what_was_there(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.jsonl"
    interrupted(demo, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="resume: cannot add example 1: No space left .* the 1 examples before it"):
            gim.evaluate(*demo, DATA, resume=path, **ASKED)
    assert path.read_bytes() == before
    assert len(gim.evaluate(*demo, DATA, resume=path, **ASKED)) == 2
    with pytest.raises(OSError, match="resume: cannot write"):
        gim.evaluate(*demo, DATA, resume=tmp_path / "nowhere" / "state", **ASKED)


def test_a_digest_of_a_model_sees_every_number(demo: Any) -> None:
    model = copy.deepcopy(demo[0])
    before = fingerprint.of_model(model)
    assert fingerprint.of_model(copy.deepcopy(model)) == before
    weight = model.get_input_embeddings().weight.data
    weight[1234, 17] += 1e-4
    assert fingerprint.of_model(model) != before


@pytest.mark.slow
def test_a_quantised_model_is_evaluated_too(demo: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(demo[0])
    quantize_(model, Int8WeightOnlyConfig())
    assert fingerprint.of_model(model) == fingerprint.of_model(model) != fingerprint.of_model(demo[0])
    assert len(gim.evaluate(model, demo[1], DATA, **{**ASKED, "methods": ("GIM", "random")})) == 2


@pytest.mark.slow
def test_a_missing_package_is_one_sentence(demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = r"gim.evaluate needs {0}: pip install 'gim-kernels\[evaluate\]'"
    for package, methods in (("scipy", "random"), ("pandas", "random"), ("captum", "occlusion"), ("sklearn", "LIME")):
        with monkeypatch.context() as patched:
            for name in [one for one in sys.modules if one.partition(".")[0] == package]:
                patched.delitem(sys.modules, name)
            patched.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=wanted.format(package)):
                gim.evaluate(*demo, DATA, methods=methods)
    found = gim.evaluate(*demo, DATA[:1], **ASKED)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=wanted.format("pyarrow")):
        found.save(tmp_path / "rows.parquet")


def test_saved_rows_are_the_frame_and_the_settings(demo: Any, tmp_path: Path) -> None:
    found = gim.evaluate(*demo, DATA, **ASKED)
    found.save(tmp_path / "rows.parquet")
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    pd.testing.assert_frame_equal(frame, found.to_dataframe())
    with pytest.raises(ValueError, match=r"path must end in \.parquet, got .*rows\.csv"):
        found.save(tmp_path / "rows.csv")
    assert list(frame.columns) == ["example", "method", "measure", "metric", "value"]
    assert set(frame["metric"]) == {"comprehensiveness", "sufficiency"}
    metadata = json.loads(pq.read_schema(tmp_path / "rows.parquet").metadata[b"gim"])
    assert metadata["name"] == "LlamaForCausalLM (gim demo model)" and metadata["seed"] == 0
    with pytest.raises(ValueError, match="reference must be one of random, attention, got 'GIM'"):
        found.table("GIM")
    with pytest.raises(ValueError, match="b must be one of"):
        found.compare("random", "GIM")
    assert list(found.seconds()["step"]) == ["random", "attention", "masked inputs"]


def test_a_saved_evaluation_is_tabulated_and_drawn_again(demo: Any, tmp_path: Path) -> None:
    found = gim.evaluate(*demo, DATA, **ASKED)
    path = tmp_path / "rows.parquet"
    found.save(path)
    again = gim.Evaluation.load(path)
    assert (again.records, again.measures, repr(again)) == (found.records, found.measures, repr(found))
    pd.testing.assert_frame_equal(again.table("random"), found.table("random"))
    assert again.to_html() == found.to_html()
    again.save(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()

    table = pq.read_table(path)
    whole = table.schema.metadata[b"gim.evaluation"]

    changed = json.loads(zlib.decompress(whole))
    changed["settings"]["seed"] = "1"

    def written(metadata: dict[bytes, bytes], rows: Any = table) -> None:
        pq.write_table(rows.replace_schema_metadata(metadata), path)

    for change, message in (
        (lambda: path.write_text("a"), "is no evaluation that can be loaded"),
        (lambda: written({b"gim": b"{}"}), r"it has no b'gim\.evaluation'"),
        (lambda: written({b"gim.evaluation": b"a"}), "is no evaluation that can be loaded"),
        (lambda: written({b"gim.evaluation": whole[:-20]}), "is no evaluation that can be loaded"),
        (lambda: written({b"gim.evaluation": zlib.compress(b"[1]")}), "is no evaluation that can be loaded"),
        (
            lambda: written({b"gim.evaluation": zlib.compress(b'{"records":[1],"measures":[],"settings":{}}')}),
            "is no evaluation that can be loaded",
        ),
        (
            lambda: written({b"gim.evaluation": zlib.compress(json.dumps(changed).encode())}),
            "is no evaluation that can be loaded: it is not as it was written",
        ),
        (lambda: written({b"gim.evaluation": whole}, table[1:]), "its values are not those of its examples"),
    ):
        change()
        with pytest.raises(ValueError, match=message):
            gim.Evaluation.load(path)
    with pytest.raises(FileNotFoundError):
        gim.Evaluation.load(tmp_path / "none.parquet")


@pytest.mark.slow
def test_the_page_loads_nothing_and_says_what_it_shows(demo: Any, tmp_path: Path) -> None:
    def mine(ids: torch.Tensor) -> torch.Tensor:
        return ids

    mine.__name__ = "<script>alert(1)</script>"
    found = gim.evaluate(*demo, DATA, **{**ASKED, "methods": [mine, "random"]})
    page = found.to_html(tmp_path / "page.html", reference="random")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(src|href)=\"(?!#)", page.replace("xlink:href", "href"))
    assert page.count('<svg role="img"') == 4  # two measures, two metrics with curves
    assert "currentColor" in page and "prefers-color-scheme: dark" in page
    assert "minus random" in page and "95 % bootstrap interval" in page
    ids = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    clips = [set(re.findall(r'<clipPath id="(\w+)"', one)) for one in ids]
    assert not clips[0] & clips[1]
    assert page == found.to_html(reference="random")


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.slow
def test_the_command_line_evaluates_a_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text, "target": target}) for text, target in DATA))
    asked = ("evaluate", "-m", str(gim.demo.model_folder()), str(rows), "--methods", "random,attention")
    files = ("--save", str(tmp_path / "a.parquet"), "--html", str(tmp_path / "a.html"))
    result = run(*asked, "--grid", "coarse", "--measures", "logprob", *files)
    assert result.exit_code == 0, result.output
    assert "comprehensiveness in logprob (higher is better)" in result.output and "minus random" in result.output
    assert len(pd.read_parquet(tmp_path / "a.parquet")) == 2 * 2 * 2
    assert (tmp_path / "a.html").stat().st_size > 10_000
    for wrong, message in (
        (("--methods", "GIMM"), "methods: 'GIMM' is none of"),
        (("--methods", "DeepLIFT"), "method DeepLIFT on example 0 ("),
        (("--reference", "GIM"), "--reference must be one of random, attention"),
        (("--save", str(tmp_path / "no" / "a.parquet")), "--save: cannot write"),
        (("--save", str(tmp_path / "a.csv")), "--save: must end in .parquet, got"),
        (("--protocol", "paper", "--grid", "coarse"), "protocol 'paper' has one grid"),
    ):
        result = run(*asked, *wrong)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    (tmp_path / "rows.jsonl").write_text('{"text": ""}')
    result = run(*asked)
    assert result.exit_code == 2 and "row 0: text must be a text that is not empty" in " ".join(result.output.split())


def test_the_command_line_says_what_to_do_about_a_logit_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, model = gim.evaluate, str(gim.demo.model_folder())

    def zeroed(*given: Any, **named: Any) -> Any:
        found = evaluate(*given, **named)
        found.records[0]["whole"][0] = 0.0
        return found

    monkeypatch.setattr(gim, "evaluate", zeroed)
    result = run("evaluate", "-m", model, "facts-in-context", "--methods", "random", "--limit", "1", "--grid", "coarse")
    assert result.exit_code == 2 and "ask for other measures" in " ".join(result.output.split()), result.output


def test_the_command_line_lists_tasks_and_shows_one() -> None:
    result = run("tasks")
    assert result.exit_code == 0 and all(name in result.output for name in tasks.TASKS)
    result = run("tasks", "sentiment")
    assert result.exit_code == 0 and "Licence: " in result.output and "Source: " in result.output
    result = run("tasks", "nothing")
    assert result.exit_code == 2 and "there is no task 'nothing'" in result.output


def test_the_command_line_shows_what_was_finished_before_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, model = gim.evaluate, str(gim.demo.model_folder())

    def stopped(*given: Any, **named: Any) -> Any:
        raise gim.EvaluationInterrupted(evaluate(*given, **named))

    monkeypatch.setattr(gim, "evaluate", stopped)
    result = run("evaluate", "-m", model, "facts-in-context", "--methods", "random", "--limit", "1", "--grid", "coarse")
    assert result.exit_code == 130 and "sufficiency in logprob" in result.output
