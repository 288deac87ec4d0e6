"""Two results beside one another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import gim
from gim.comparison import Comparison
from gim.report import comparison
from tests.families import text_model, tokenizer
from tests.gim.test_cli import run

PROMPT = "The cat sat on the mat and the rat ate the cat."


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model()


def made(model: Any, text: str = PROMPT, **named: Any) -> gim.Attribution:
    found = gim.attribute(model, tokenizer(), text, **named)
    assert isinstance(found, gim.Attribution)
    return found


def test_rules_word_by_word(model: Any) -> None:
    first, second = made(model), made(model, rules="GIM_CONSTANT")
    both = first.compare(second)
    sides = [first.to_words(), second.to_words()]
    assert [one.text for one in both.words] == [span.text for span in sides[0]]
    totals = [sum(abs(span.score) for span in side) for side in sides]
    for one, a, b in zip(both.words, *sides, strict=True):
        assert (one.first, one.second) == (a, b)
        assert one.shares == pytest.approx((a.score / totals[0], b.score / totals[1]))
        assert one.change == pytest.approx(b.score / totals[1] - a.score / totals[0])
    want = stats.pearsonr([span.score for span in sides[0]], [span.score for span in sides[1]]).statistic
    assert both.correlation == pytest.approx(want)
    changes = both.changes(3)
    assert [one.change for one in changes] == sorted((one.change for one in both.words), key=lambda x: -abs(x))[:3]
    assert [name for name, *_ in both.differences()] == ["Rules"]
    frame = both.to_dataframe()
    assert (
        frame["change"].to_list() == [one.change for one in both.words]
        and list(frame["word"]) == PROMPT.replace(".", " .").split()
    )
    assert first.compare(first).differences() == [] and first.compare(first).correlation == pytest.approx(1)


def test_prompts_that_differ(model: Any) -> None:
    first, second = made(model), made(model, "The cat sat on a hat and the rat ate the cat.")
    both = first.compare(second)
    missing = {(one.first and one.first.text, one.second and one.second.text) for one in both.words}
    assert {("the", None), ("mat", None), (None, "a"), (None, "hat"), ("rat", "rat")} <= missing
    assert [one.first.text for one in both.words if one.first] == [span.text for span in first.to_words()]
    assert [one.second.text for one in both.words if one.second] == [span.text for span in second.to_words()]
    assert "Prompt" in [name for name, *_ in both.differences()]
    lonely = made(model, "cat").compare(made(model, "mat"))
    assert lonely.correlation is None
    long = made(model, "The cat " * 20 + "sat").compare(made(model, "The cat " * 20 + "ate"))
    assert any(name == "Prompt" for name, *_ in long.differences())


@pytest.mark.parametrize(
    ("text", "said"), [("The dog", "1 word in both."), ("The cat", "2 words in both."), ("Oh well", "0 words in both.")]
)
def test_few_shared_words_have_no_correlation(model: Any, text: str, said: str) -> None:
    both = made(model, "The cat sat").compare(made(model, text))
    assert both.correlation is None and comparison.said(both) == said


def test_measures_are_named_as_everywhere(model: Any) -> None:
    rows = made(model).compare(made(model, measure="logodds")).differences()
    (target,) = [row for row in rows if row[0] == "Target"]
    assert ", logit " in target[1] and ", log-odds " in target[2]


def test_what_is_no_comparison(model: Any) -> None:
    with pytest.raises(TypeError, match="other must be an Attribution, got str"):
        made(model).compare("x")
    with pytest.raises(ValueError, match="k must be a whole number >= 1, got 0"):
        made(model).compare(made(model)).changes(0)


def test_the_page_has_both_and_escapes_them(model: Any, tmp_path: Path) -> None:
    text = "The <b>cat</b> & \u202e sat."
    both = Comparison(made(model, text), made(model, text, rules="ATTNLRP", target=" cat"))
    page = both.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "<b>cat" not in page and "\u202e" not in page and "http" not in page.replace("http-equiv", "")
    for prefix, one in (("a", both.first), ("b", both.second)):
        shown = dict(re.findall(rf"<span id={prefix}(\d+)[^>]* data-s=([^>]+)>", page))
        assert len(shown) == len(one)
        assert all(float(shown[str(at)]) == pytest.approx(float(one.scores[at]), rel=6e-3) for at in range(len(one)))
    assert all(name in page for name in ("ATTNLRP", "Rules, first", "Target, second"))


def test_the_command_line_compares_two(model: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    made(model).to_json(first)
    made(model, rules="GRADIENT").to_json(second)
    page = tmp_path / "page.html"
    shown = run("show", first, second, "--html", page)
    assert shown.code == 0 and "What differs" in shown.out and "Words whose share" in shown.out
    assert page.read_text(encoding="utf-8") == made(model).compare(made(model, rules="GRADIENT")).to_html()
    answer = gim.attribute(model, tokenizer(), PROMPT, answer=" The cat")
    answer.to_json(second)
    assert run("show", first, second, "--html", page).code == 0
    assert torch.equal(gim.AnswerAttribution.from_json(second).scores, answer.scores)
