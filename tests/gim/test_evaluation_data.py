"""What is evaluated on: every form of data, what is refused by name, and the tasks in the box."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

import gim
import gim.demo
from gim.evaluation import data, tasks
from gim.evaluation.perturbation import Forwards

FIRST = "The password of Irene is lantern. The password of Irene is"
OTHER = "The password of Otto is camel. The password of Otto is"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return gim.demo.load()


def chosen(demo: tuple[Any, Any], given: Any, limit: int | None = None) -> data.Chosen:
    model, tokenizer = demo
    rows = data.read(given, tokenizer, seed=0, limit=limit)
    return data.choose(model, tokenizer, Forwards(model), rows, limit)


def test_every_form_of_data_is_the_same_examples(demo: Any, tmp_path: Path) -> None:
    rows = [{"text": FIRST, "target": " lantern", "id": "a"}, {"text": OTHER, "target": " camel", "id": "b"}]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    pd.DataFrame(rows).assign(unread=1).to_parquet(tmp_path / "rows.parquet")
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "saved"))
    wanted = chosen(demo, rows)
    assert [kept.example.id for kept in wanted.kept] == ["a", "b"] and wanted.dropped == 0
    marked = tmp_path / "marked.jsonl"
    marked.write_text(lines.read_text(encoding="utf-8"), encoding="utf-8-sig")
    numbers = [row | {"target": np.int64(demo[1].encode(row["target"], add_special_tokens=False)[0])} for row in rows]
    files = (lines, marked, str(tmp_path / "rows.parquet"), tmp_path / "saved")
    for given in (*files, table, table.to_iterable_dataset(), numbers):
        found = chosen(demo, given)
        assert [(one.example.id, one.ids.tolist(), one.target, one.foil) for one in found.kept] == [
            (one.example.id, one.ids.tolist(), one.target, one.foil) for one in wanted.kept
        ]
    pairs = chosen(demo, [(FIRST, " lantern"), (OTHER, " camel", [" lantern", " tiger"])])
    assert [one.target for one in pairs.kept] == [one.target for one in wanted.kept]
    assert pairs.kept[1].foil in demo[1].encode(" lantern tiger", add_special_tokens=False)
    # Ids of another name than their rows', and the prediction where no target is named.
    assert [kept.example.id for kept in chosen(demo, [FIRST, OTHER]).kept] == ["0", "1"]
    assert chosen(demo, [FIRST]).kept[0].target == wanted.kept[0].target


def test_what_the_model_has_wrong_is_dropped_and_counted(demo: Any) -> None:
    found = chosen(demo, [(FIRST, " camel"), (FIRST, " lantern", " camel"), (OTHER, " tiger"), (OTHER, " camel")])
    assert [kept.example.id for kept in found.kept] == ["1", "3"]
    assert (found.seen, found.dropped) == (4, 2)
    few = chosen(demo, [(FIRST, " camel"), (FIRST, " lantern"), (OTHER, " camel")], limit=1)
    assert (len(few.kept), few.seen, few.dropped) == (1, 2, 1)
    with pytest.raises(ValueError, match="the model has none of the 1 examples right"):
        chosen(demo, [(FIRST, " camel")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data holds no example"),
        ([FIRST, ""], "data, row 1: text must be a text that is not empty"),
        ([{"target": " camel"}], "data, row 0: text must be a text"),
        ([{"text": FIRST, "id": "a"}, {"text": OTHER, "id": "a"}], "row 1: the id 'a' is that of data, row 0 too"),
        ([{"text": FIRST, "id": ""}], "data, row 0: id must not be empty"),
        ([(FIRST, "two words")], "data, row 0: target must be one token"),
        ([(FIRST, 99999)], "data, row 0: the model has 2048 logits, and none for token 99999"),
        ([(FIRST, None, " camel")], "data, row 0: a foil needs a target"),
        ([(FIRST, " camel", " camel")], "data, row 0: a token is both target and foil"),
        ([(FIRST, 1.5)], "data, row 0: target must be a token, as id or text"),
        (["."], "data, row 0: text must have three tokens at least, got 2"),
        (["word " * 9000], "data, row 0: the prompt has 18,001 tokens"),
        ([3], "data, row 0 must be a text, a pair"),
        (3, "data must be a task, a file, a Dataset or a list"),
        # Python goes through these by the names of their columns, each a text of its own.
        (pd.DataFrame({FIRST: [OTHER]}), r"data must be rows, got DataFrame: give .* to_dict\('records'\)"),
        (datasets.DatasetDict({FIRST: datasets.Dataset.from_list([{"text": OTHER}])}), "data must be rows, got Datase"),
        ("no-task", "data: 'no-task' is no file, and no task: those are indirect-objects"),
    ],
)
def test_what_does_not_fit_is_named_with_its_row(demo: Any, given: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        chosen(demo, given)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text', "rows.jsonl, row 1 is not JSON"),
        ("rows.jsonl", b'\n\n{"text": "a"}\n\n{"text', "rows.jsonl, row 1 is not JSON"),
        ("rows.jsonl", b"[" * 100_000, "rows.jsonl, row 0 is not JSON that can be read: it is nested too deeply"),
        ("rows.jsonl", b"\xff\xfe\n", "rows.jsonl, row 0 is not text in UTF-8"),
        ("rows.parquet", b"PAR2", "rows.parquet is not a Parquet file"),
        ("rows.csv", b"text\n", "data must be a file .jsonl or .parquet"),
    ],
)
def test_a_file_that_is_none_is_named(demo: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(data.read(tmp_path / name, demo[1], seed=0, limit=None))


def test_damaged_pages_and_folders_of_several_parts_are_named(demo: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"text": [FIRST, OTHER]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[30:90] = b"\xff" * 60
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows.parquet is not a Parquet file, or a damaged one"):
        list(data.read(path, demo[1], seed=0, limit=None))
    parts = datasets.DatasetDict({FIRST: datasets.Dataset.from_list([{"text": OTHER}])})
    parts.save_to_disk(str(tmp_path / "parts"))
    with pytest.raises(TypeError, match="data must be rows, got DatasetDict of 'The password"):
        list(data.read(tmp_path / "parts", demo[1], seed=0, limit=None))


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1] * len(text.split())


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_s_prompts_are_different_seeded_and_answerable(name: str) -> None:
    count = 2 if "needle" in name else 40
    drawn = list(tasks.draw(name, Words(), count, 0))
    assert len({text for text, _, _ in drawn}) == count
    assert drawn == list(tasks.draw(name, Words(), count, 0)) != list(tasks.draw(name, Words(), count, 1))
    for text, right, wrong in drawn:
        assert right and wrong and not set(right) & set(wrong)
        if name in ("indirect-objects", "facts-in-context") or "needle" in name:
            assert all(answer.strip() in text for answer in (*right, *wrong))
        if "needle" in name:
            assert (2048 if name == "needle" else 8000) <= len(text.split()) < 8200
            assert text.count(right[0]) == 1
    page = tasks.TASKS[name].page()
    assert "Source: " in page and "Licence: MIT" in page and page.count("right: ") == 3


def test_what_a_task_calls_right_is_right() -> None:
    for text, right, wrong in tasks.draw("greater-than", Words(), 40, 0):
        decade = int(text.split(" year ")[1][2] if " year " in text else text.split(" began in ")[1][2])
        assert all(int(one) > decade for one in right) and all(int(one) < decade for one in wrong)
    for text, right, _ in tasks.draw("indirect-objects", Words(), 40, 0):
        assert text.count(right[0].strip()) == 1
    for text, right, _ in tasks.draw("facts-in-context", Words(), 40, 0):
        asked = text.rsplit("The password of ", 1)[1].removesuffix(" is")
        assert f"The password of {asked} is{right[0]}." in text
    for text, right, _ in tasks.draw("agreement", Words(), 40, 0):
        subject = next(one for one in tasks.agreement.SUBJECTS if f"the {one} " in text or f"the {one}s " in text)
        assert right == ((" are",) if f"the {subject}s " in text else (" is",))
    for text, right, _ in tasks.draw("sentiment", Words(), 40, 0):
        assert right == ((" positive",) if any(one in text for one in tasks.sentiment.POSITIVE) else (" negative",))


def test_a_task_that_a_tokenizer_cannot_answer_in_one_token_has_no_example() -> None:
    class Letters(Words):
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1] * len(text)

    assert list(tasks.draw("agreement", Letters(), 3, 0)) == []
    with pytest.raises(ValueError, match="data holds no example"):
        list(data.read("agreement", Letters(), seed=0, limit=3))


def test_a_task_is_evaluated_by_its_name(demo: Any) -> None:
    found = gim.evaluate(*demo, "facts-in-context", methods="random", grid="coarse", limit=2, measures="logprob")
    assert len(found) == 2 and found.dropped == found.settings["seen"] - 2


def test_numbers_that_are_none_are_an_error(demo: Any) -> None:
    class Broken(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.full((*ids.shape, 2048), float("nan"))

    with pytest.raises(FloatingPointError, match="data, row 0: the logits hold NaN or infinity"):
        gim.evaluate(Broken(), demo[1], [FIRST], methods="random")
