"""Attribution: sums over ranges, ranks, files."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gim import rules, segments
from gim.applied import Application, AppliedReport
from gim.attribution import Attribution, Span, check_writable, write_atomically
from gim.targets import Explained


def attribution(
    text: str,
    offsets: list[tuple[int, int]],
    scores: list[float],
    special: list[bool] | None = None,
    **fields: Any,
) -> Attribution:
    special = special or [False] * len(offsets)
    report = AppliedReport(
        "GIM", [Application("attention", "layers.0.attn", "Attention", "temperature", "interface", "blockwise", 1)]
    )
    return Attribution(
        text=text,
        tokens=tuple(text[a:b] or "<s>" for a, b in offsets),
        token_ids=tuple(range(len(offsets))),
        offsets=tuple(offsets),
        scores=torch.tensor(scores, dtype=torch.float32),
        special=tuple(special),
        target=Explained("prediction", "' x'", (1,), (" x",), (3,), "logit", 1.25),
        rules=rules.GIM,
        engine="blockwise",
        report=report,
        model="Model (tiny)",
        baseline=(0, " "),
        versions={"torch": "2"},
        memory="all kept",
        **fields,
    )


SENTENCES = "The password of Irene is lantern. Is it? Yes."
#          0         1         2         3         4
#          0123456789012345678901234567890123456789012345


def pieces(text: str, sizes: list[int]) -> list[tuple[int, int]]:
    offsets, start = [], 0
    for size in sizes:
        offsets.append((start, start + size))
        start += size
    assert start == len(text)
    return offsets


# --------------------------------------------------- sums over ranges


def test_words_and_sentences_by_hand() -> None:
    # " lantern." lies in two words; " i" + "s it? Y" cuts through words and through a sentence.
    offsets = pieces(SENTENCES, [3, 9, 3, 6, 3, 9, 2, 7, 3])
    result = attribution(SENTENCES, offsets, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 60.0, 128.0])
    assert [(w.text, w.score) for w in result.to_words()] == [
        ("The", 1.0),
        ("password", 2.0),
        ("of", 4.0),
        ("Irene", 8.0),
        ("is", 16.0),
        ("lantern", 28.0),
        (".", 4.0),
        # " I" is one visible character; "s it? Y" has five: s, i, t, ?, Y.
        ("Is", 64.0 + 12.0),
        ("it", 24.0),
        ("?", 12.0),
        ("Yes", 12.0 + 128.0 * 2 / 3),
        (".", pytest.approx(128.0 / 3)),
    ]
    assert [(s.text, s.score, s.tokens) for s in result.to_sentences()] == [
        ("The password of Irene is lantern.", 63.0, (0, 6)),
        ("Is it?", 112.0, (6, 8)),
        ("Yes.", 140.0, (7, 9)),
    ]


def test_white_space_tokens_belong_to_what_follows_and_at_the_end_to_what_is_before() -> None:
    text = "One.\n\n Two. \n"
    offsets = pieces(text, [3, 1, 2, 4, 1, 1, 1])
    result = attribution(text, offsets, [1, 2, 4, 8, 16, 32, 64])
    assert [(w.text, w.score) for w in result.to_words()] == [("One", 1), (".", 2), ("Two", 12), (".", 112)]
    assert [(s.text, s.score) for s in result.to_sentences()] == [("One.", 3), ("Two.", 124)]
    # A range by characters holds only the white space that is in it: here half of the second line end.
    assert result.spans([(0, 5)])[0].score == pytest.approx(3 + 2)


def test_tokens_without_characters_and_tokens_that_share_one() -> None:
    text = "a 日b"
    offsets = [(0, 0), (0, 0), (0, 1), (1, 3), (2, 3), (2, 3), (3, 4), (4, 4)]
    special = [True, False, False, False, False, False, False, False]
    result = attribution(text, offsets, [100, 1, 2, 4, 8, 16, 32, 64], special)
    assert [(w.text, w.score) for w in result.to_words()] == [("a", 3), ("日", 28), ("b", 96)]
    with_special = result.to_words(skip_special=False)
    assert with_special[0] == Span("<s>", 0, 0, 100.0, (0, 1))
    assert sum(w.score for w in with_special) == 227


def test_special_tokens_in_the_text_are_segments_of_their_own() -> None:
    text = "<s>Hi there<e> <s>"
    offsets = [(0, 3), (3, 5), (5, 11), (11, 14), (14, 15), (15, 18)]
    result = attribution(text, offsets, [1, 2, 4, 8, 16, 32], [True, False, False, True, False, True])
    assert [(w.text, w.score) for w in result.to_words()] == [("Hi", 2), ("there", 20)]
    everything = result.to_sentences(skip_special=False)
    assert [(s.text, s.score) for s in everything] == [("<s>", 1), ("Hi there", 22), ("<e>", 8), ("<s>", 32)]
    assert result.spans([(0, 5)])[0].score == 2
    assert result.spans([(0, 5)], skip_special=False)[0].score == 3


def test_spans_by_name_overlap_and_are_checked() -> None:
    offsets = pieces(SENTENCES, [3, 9, 3, 6, 3, 9, 12])
    result = attribution(SENTENCES, offsets, [1, 2, 4, 8, 16, 32, 64])
    name, fact = result.spans({"name": (16, 21), "fact": (0, 33)})
    assert (name.name, name.text, name.score, name.tokens) == ("name", "Irene", 8.0, (3, 4))
    assert (fact.name, fact.score, fact.tokens) == ("fact", 63.0, (0, 6))
    for bad in [(5, 5), (7, 3), (-1, 3), (0, 46)]:
        with pytest.raises(ValueError, match=r"spans\[1\].*0 <= start < end <= 45"):
            result.spans([(0, 1), bad])
    no_range: Any
    for no_range in [(3,), (3, 4, 5), 3, "ab", (0.0, 1.0), None]:
        with pytest.raises(TypeError, match=r"spans\[1\] must be \(start, end\), two whole numbers, got "):
            result.spans([(0, 1), no_range])
        with pytest.raises(TypeError, match=r"spans\['name'\] must be \(start, end\), two whole numbers, got "):
            result.spans({"name": no_range})
    no_ranges: Any
    for no_ranges in ("abc", 3, None):
        with pytest.raises(TypeError, match=r"spans must be a list of \(start, end\), or such by name, got "):
            result.spans(no_ranges)
    assert result.spans(np.array([[16, 21]])) == [replace(name, name="")]
    with pytest.raises(ValueError, match=r"spans\['far'\]"):
        result.spans({"far": (0, 99)})
    nothing = attribution("ab cd", [(0, 2)], [1.0]).spans([(3, 5)])[0]
    assert (nothing.score, nothing.tokens) == (0.0, (1, 1))


def test_only_white_space_and_nothing() -> None:
    blank = attribution(" \n", [(0, 0), (0, 1), (1, 2)], [5, 1, 2], [True, False, False])
    assert [(w.text, w.score) for w in blank.to_words()] == [(" \n", 3)]
    empty = attribution("", [], [])
    assert (empty.to_words(), empty.to_sentences(), empty.top()) == ([], [], [])
    assert attribution("", [(0, 0)], [7], [True]).to_words() == []


TEXTS = st.text(
    st.sampled_from("ab Zé.!?\n\t 日本。ののカ👩\u200d\u0301'39,-_ัก\u00a0\ud800")
    | st.characters(categories=("L", "M", "N", "P", "S", "Z", "C")),
    max_size=40,
)


@st.composite
def attributions(draw: st.DrawFn) -> Attribution:
    """Any text, cut anywhere, with gaps, empty tokens and tokens that share characters."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    offsets = []
    for start, end in pairwise(cuts):
        offsets += [(start, end)] * draw(st.sampled_from([0, 1, 1, 1, 2]))
    count = len(offsets)
    scores = draw(st.lists(st.floats(-100, 100, width=32), min_size=count, max_size=count))
    special = draw(st.lists(st.sampled_from([False, False, True]), min_size=count, max_size=count))
    return attribution(text, offsets, scores, special)


@settings(max_examples=300, deadline=None)
@given(attributions())
def test_sums_over_words_and_over_sentences_lose_nothing(result: Attribution) -> None:
    scores = result.scores.tolist()
    ordinary = sum(s for s, special in zip(scores, result.special, strict=True) if not special)
    everything = sum(scores)
    for cut in (result.to_words, result.to_sentences):
        assert sum(s.score for s in cut()) == pytest.approx(ordinary, abs=1e-6)
        assert sum(s.score for s in cut(skip_special=False)) == pytest.approx(everything, abs=1e-6)


@settings(max_examples=200, deadline=None)
@given(attributions(), st.data())
def test_spans_equal_a_sum_over_single_characters(result: Attribution, data: st.DataObject) -> None:
    if not result.text:
        return
    start = data.draw(st.integers(0, len(result.text) - 1))
    end = data.draw(st.integers(start + 1, len(result.text)))
    # The rule of the documentation, one character at a time and with exact fractions.
    expected = Fraction(0)
    for (first, last), score, special in zip(result.offsets, result.scores.tolist(), result.special, strict=True):
        characters = [i for i in range(first, last) if not result.text[i].isspace()] or list(range(first, last))
        if special:
            continue
        if characters:
            expected += Fraction(score) * sum(start <= i < end for i in characters) / len(characters)
        elif start <= first < end or first == end == len(result.text):
            expected += Fraction(score)
    assert result.spans([(start, end)])[0].score == pytest.approx(float(expected), abs=1e-9)


# --------------------------------------------------- segments


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_segments_cover_all_that_is_not_white_space(text: str) -> None:
    for cut in (segments.words, segments.sentences):
        ranges = cut(text)
        covered = [i for start, end in ranges for i in range(start, end)]
        assert covered == sorted(set(covered))
        assert {i for i, c in enumerate(text) if not c.isspace()} <= set(covered)
        assert all(text[start:end].strip() == text[start:end] != "" for start, end in ranges)
    assert all(not any(c.isspace() for c in text[start:end]) for start, end in segments.words(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop: 3.14, 1,000!", "Don't|stop|:|3.14|,|1,000|!"),
        ("snake_case==x...y", "snake_case|==|x|...|y"),
        ("naïve cafe\u0301 Straße", "naïve|cafe\u0301|Straße"),
        ("हिन्दी में शब्द", "हिन्दी|में|शब्द"),
        ("مرحبا بالعالم", "مرحبا|بالعالم"),
        ("日本語のテキスト。", "日|本|語|の|テキスト|。"),
        ("ภาษา", "ภ|า|ษ|า"),
        ("os.path 3.日a.日", "os.path|3|.|日|a|.|日"),
        ("한국어 단어", "한국어|단어"),
        ("👩\u200d👩\u200d👧👍🏽🇩🇪🇫🇷", "👩\u200d👩\u200d👧|👍🏽|🇩🇪|🇫🇷"),
        ("“quoted” (x)", "“|quoted|”|(|x|)"),
    ],
)
def test_words_of_many_scripts(text: str, expected: str) -> None:
    assert "|".join(text[start:end] for start, end in segments.words(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said "No." Then? Yes!! (Maybe.) End', 'He said "No."|Then?|Yes!!|(Maybe.)|End'),
        ("Dr. J. Smith paid 3.50 at approx. noon. Fine.", "Dr. J. Smith paid 3.50 at approx. noon.|Fine."),
        ("a hard\nwrapped line\nNext line\n\nlast", "a hard\nwrapped line|Next line|last"),
        ("1. First item\n2. Second item", "1. First item|2. Second item"),
        ("日本です。次\uff01「はい。」終", "日本です。|次\uff01|「はい。」|終"),
        ("كيف؟ نعم. क्या? हाँ। ठीक", "كيف؟|نعم.|क्या?|हाँ।|ठीक"),
        ("Wait... what? See example.com/a.b now", "Wait... what?|See example.com/a.b now"),
    ],
)
def test_sentences(text: str, expected: str) -> None:
    assert "|".join(text[start:end] for start, end in segments.sentences(text)) == expected


#: Where sentences may end, as it is said in the plainest way: from any character on.
_PLAINLY = re.compile(
    r"(?P<spaced>[.!?\u2026\u203d\u061f\u06d4\u0964\u0965\u1362\u104b\u17d4]+" + segments._CLOSING + r")(?=\s|$)"
    r"|(?P<unspaced>[\u3002\uff01\uff1f\uff61]+" + segments._CLOSING + r")"
    r"|(?P<line>[^\S\n\v\f\r\x1c-\x1e\x85\u2028\u2029]*[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*)"
)


@settings(max_examples=1000)
@given(st.text(st.sampled_from('aB1 \t\u3000\n\r\x85.!\u2026\u3002\uff01)"\u300d'), max_size=12))
def test_possible_ends_of_sentences_are_those_of_the_plain_pattern(text: str) -> None:
    found, want = (
        [(one.span(), one.groupdict()) for one in pattern.finditer(text)]
        for pattern in (segments._SENTENCE_END, _PLAINLY)
    )
    assert found == want


@pytest.mark.parametrize("run", [" ", "\t", ".", ".)", ")", "\u3002", "\n", ". "])
@pytest.mark.parametrize("around", ["", "a"])
def test_sentences_of_long_runs_take_no_time(run: str, around: str) -> None:
    """A hundred thousand spaces took more than a minute."""
    text = around + run * 100_000 + around
    began = time.perf_counter()
    segments.sentences(text)
    assert time.perf_counter() - began < 5


# --------------------------------------------------- ranks


def test_top_orders_ties_and_special_tokens() -> None:
    result = attribution(
        "abcde", pieces("abcde", [1] * 5), [-2.0, 1.0, 9.0, 2.0, 0.0], [False] * 2 + [True] + [False] * 2
    )
    assert [(t.rank, t.position, t.token, t.score) for t in result.top(3)] == [
        (1, 0, "a", -2.0),
        (2, 3, "d", 2.0),
        (3, 1, "b", 1.0),
    ]
    assert [t.position for t in result.top(by="positive")] == [3, 1]
    assert [t.position for t in result.top(by="negative")] == [0]
    assert [t.position for t in result.top(skip_special=False)] == [2, 0, 3, 1, 4]
    assert (result.top(1)[0].start, result.top(1)[0].end) == (0, 1)
    ties = attribution("x" * 5000, pieces("x" * 5000, [1] * 5000), [1.0, -1.0] * 2500)
    assert [t.position for t in ties.top(5000)] == list(range(5000))
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k must be a whole number >= 1"):
            result.top(k)
    with pytest.raises(ValueError, match=r"by must be one of .*'largest'"):
        result.top(by="largest")


def test_best_in_a_range() -> None:
    result = attribution("ab cd ef", [(0, 0), (0, 2), (2, 5), (5, 8)], [99, -3, 1, 2], [True, False, False, False])
    assert (result.best_in(3, 8).position, result.best_in(3, 8).rank) == (3, 1)
    assert result.best_in(0, 2).rank == 3
    assert result.best_in(0, 2, by="abs").rank == 1
    assert result.best_in(0, 4, by="positive").position == 2
    with pytest.raises(ValueError, match="the range must satisfy"):
        result.best_in(4, 9)
    with pytest.raises(ValueError, match="no token has a character"):
        attribution("ab cd", [(0, 2)], [1.0]).best_in(2, 5)


# --------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"token_ids": (1,)}, ValueError, "token_ids must have one entry for each of the 2 tokens, got 1"),
        ({"special": ()}, ValueError, "special must have one entry"),
        ({"offsets": ((0, 1),)}, ValueError, "offsets must have one entry"),
        ({"offsets": ((0, 1), (1, 3))}, ValueError, r"offsets of token 1 .* got \(1, 3\)"),
        ({"offsets": ((0, 1), (2, 1))}, ValueError, "offsets of token 1"),
        ({"scores": torch.tensor([1.0, float("nan")])}, ValueError, r"token 1 \('b'\) has nan"),
        ({"scores": torch.tensor([float("inf"), 0.0])}, ValueError, "token 0 .* has inf"),
        ({"scores": torch.zeros(2, dtype=torch.float64)}, ValueError, "float32 on the CPU, got torch.float64"),
        ({"scores": torch.zeros(1, 2)}, ValueError, r"shape \[T\], got \[1, 2\]"),
        ({"scores": torch.zeros(3)}, ValueError, "scores must have one entry"),
        ({"scores": torch.zeros(2, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"scores": [1.0, 2.0]}, TypeError, "scores must be a tensor, got list"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(attribution("ab", [(0, 1), (1, 2)], [1.0, 2.0]), **fields)


# --------------------------------------------------- files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HOSTILE = "</script>\u202e\x00\ud800 \u2028é\r\n\t\"'日"


@settings(max_examples=100, deadline=None)
@given(attributions())
def test_json_is_lossless(result: Attribution) -> None:
    again = Attribution.from_json(result.to_json())
    assert again == result
    assert again.scores.numpy().tobytes() == result.scores.numpy().tobytes()


def test_json_file_and_equality(tmp_path: Path) -> None:
    result = attribution(HOSTILE, [(0, 9), (9, len(HOSTILE))], [0.1, -1e-38])
    path = tmp_path / "a.json"
    assert result.to_json(path) == path.read_text(encoding="utf-8")
    assert Attribution.from_json(path) == Attribution.from_json(str(path)) == result
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert (fields["schema_version"], fields["rules_name"], fields["text"]) == (1, "GIM", HOSTILE)
    assert result != replace(result, engine="other")
    assert result != replace(result, scores=result.scores + 1)
    assert result != "text"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2; this version of gim-kernels reads version 1"),
        ({"schema": "other"}, "is not an attribution"),
        ({"scores": None}, "field 'scores' is missing"),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fields = json.loads(attribution("a", [(0, 1)], [1.0]).to_json()) | change
    path = tmp_path / "a.json"
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        Attribution.from_json(path)
    path.write_text("{]")
    with pytest.raises(ValueError, match="is not JSON"):
        Attribution.from_json(path)


def test_writable_is_found_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new")
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"
    with pytest.raises(IsADirectoryError, match=r"--html: cannot write .*: it is a folder"):
        check_writable(tmp_path, "--html")
    with pytest.raises(FileNotFoundError, match=r"--json: cannot write .*none.a: folder .*none does not exist"):
        check_writable(tmp_path / "none" / "a", "--json")
    with pytest.raises(NotADirectoryError, match="old is not a folder"):
        check_writable(tmp_path / "old" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "none" / "a")
    with pytest.raises(FileNotFoundError, match=r"cannot write .*link: folder .*none does not exist"):
        check_writable(tmp_path / "link")
    with pytest.raises(OSError, match="not an ordinary file"):
        check_writable(os.devnull)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"--png: cannot write .*new: Permission denied"):
        check_writable(tmp_path / "new", "--png")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    write_atomically(link, b"newer")
    assert (path.read_bytes(), path.stat().st_mode & 0o777, link.is_symlink()) == (b"newer", 0o640, True)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"^cannot write {path}: No space left on device$"):
        write_atomically(path, b"lost")
    assert path.read_bytes() == b"newer"
    assert names(tmp_path) == ["a", "link"]


def test_repr_is_short() -> None:
    text = "x" * 5000
    result = attribution(text, pieces(text, [1] * 5000), [0.0] * 4999 + [-0.5])
    assert len(repr(result)) < 300
    assert "5000 tokens" in repr(result)
    assert "'x' -0.5" in repr(result)
