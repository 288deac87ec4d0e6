"""The text of ids, and the place of each in it: as of the text itself, and by its bytes where it is cut another way."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import gim
import gim.demo
from gim.answers import Unit
from gim.asked import decoded
from tests.families import tokenizer

#: One to four bytes, with what joins, marks and changes direction.
CHARACTERS = "ab .\n\u00e9\u0301\u05e9\u05b8\u05c1\u200d\u65e5\u672c\ufffd\U0001f469\U0001f3fd\U0001f600\U00013000"
TEXTS = st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=12)
SAMPLES = (
    " \U0001f469 cat \u65e5\u672c sat",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd e\u0301",
    "a \ufffd b",
)


@cache
def byte_fallback() -> Any:
    """A tokenizer of a few characters, and of bytes for all others."""
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", ".", "\u65e5"]
    vocabulary = {one: place for place, one in enumerate(known)}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@cache
def first_space() -> Any:
    """The same, which puts a space in front of a text, and takes one from what it decodes, as Llama 2's."""
    made = Tokenizer.from_str(byte_fallback().backend_tokenizer.to_str())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), made.normalizer])
    made.decoder = decoders.Sequence([made.decoder, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@cache
def demo() -> Any:
    return gim.demo.load()


@cache
def byte_level() -> Any:
    return tokenizer()


def bytes_of(made: Any, one: int) -> bytes:
    """What a token of :func:`byte_level` or :func:`byte_fallback` says, without their decoders."""
    token = made.convert_ids_to_tokens(one)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    if made is byte_fallback():
        return token.replace("\u2581", " ").encode()
    # GPT-2's: printable bytes are themselves, the others follow one another from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return bytes(ord(one) if ord(one) < 256 else others[ord(one) - 256] for one in token)


@cache
def said(made: Any) -> dict[int, bytes]:
    """What each token but the special first says."""
    return {one: bytes_of(made(), one) for one in range(1, len(made()))}


def places(text: str, said: list[bytes]) -> list[tuple[int, int]]:
    """The characters that the bytes of each token are part of."""
    owner = [place for place, character in enumerate(text) for _ in character.encode()]
    found, at = [], 0
    for one in said:
        found.append((owner[at], owner[at + len(one) - 1] + 1))
        at += len(one)
    assert at == len(owner)
    return found


@pytest.mark.parametrize("made", [byte_level, byte_fallback, lambda: demo()[1]], ids=["bytes", "fallback", "demo"])
@given(TEXTS)
@example(SAMPLES[0])
@example(SAMPLES[1])
@example(SAMPLES[2])
@example(SAMPLES[3])
def test_ids_of_a_text_are_where_its_tokenizer_says(made: Any, text: str) -> None:
    cut = made()(text, add_special_tokens=False, return_offsets_mapping=True)
    assert made().decode(cut.input_ids) == text
    assert decoded(cut.input_ids, made()) == (text, cut.offset_mapping)


@pytest.mark.parametrize("made", [byte_level, byte_fallback], ids=["bytes", "fallback"])
@given(st.lists(TEXTS.map(lambda text: text.replace("\ufffd", "")), min_size=1, max_size=4), st.data())
def test_ids_that_cut_a_text_another_way_are_where_their_bytes_are(made: Any, texts: list[str], data: Any) -> None:
    """Parts cut alone, or as single bytes, are not what the tokenizer makes of the whole."""
    says = said(made)
    single = {bytes_: one for one, bytes_ in reversed(says.items())}
    ids: list[int] = []
    for text in texts:
        in_bytes = data.draw(st.booleans())
        ids += (
            [single[bytes([b])] for b in text.encode()] if in_bytes else made().encode(text, add_special_tokens=False)
        )
    whole = "".join(texts)
    assert decoded(ids, made()) == (whole, places(whole, [says[one] for one in ids]))


@pytest.mark.parametrize(
    "made",
    [byte_level, byte_fallback, first_space, lambda: demo()[1]],
    ids=["bytes", "fallback", "first space", "demo"],
)
@given(st.data())
def test_any_ids_have_places_in_order_that_leave_nothing_out(made: Any, data: Any) -> None:
    """Bytes that are no characters, and ids that the tokenizer does not have, which say nothing."""
    ids = data.draw(st.lists(st.integers(1, len(made()) + 3) | st.integers(len(made()) - 5, len(made())), max_size=12))
    text, spans = decoded(ids, made())
    assert text == made().decode(ids) and len(spans) == len(ids)
    reached = 0
    for one, (start, end) in zip(ids, spans, strict=True):
        assert 0 <= start <= reached <= max(end, reached) <= len(text)
        assert one < len(made()) or start == end
        reached = max(reached, end)
    assert reached == len(text)


def test_an_answer_as_ids_is_the_answer_as_text() -> None:
    model, made = demo()
    for text in SAMPLES:
        ids = made.encode(text, add_special_tokens=False)
        want = gim.attribute(model, made, "The cat", answer=text)
        found = gim.attribute(model, made, "The cat", answer=ids)
        assert found == want
        units: list[tuple[Unit, Unit]] = [("token", "token"), ("word", "word"), ("sentence", "segment")]
        for rows, columns in units:
            one, other = (answer.to_table(rows, columns) for answer in (found, want))
            assert one.rows == other.rows and one.answer == other.answer and bool((one.scores == other.scores).all())
        as_text, as_ids = (
            gim.attribute(model, made, "The cat", target=gim.targets.Continuation(given)) for given in (text, ids)
        )
        assert as_ids == as_text


@pytest.mark.parametrize("made", [byte_level, byte_fallback], ids=["bytes", "fallback"])
@pytest.mark.parametrize("given_", [" the cat \u65e5\u672c", "\U0001f469", b"\xf0", b"\xf0\x9f a", None])
def test_decoding_takes_work_in_proportion(
    made: Any, given_: str | bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of single bytes, of bytes that are no characters and of ids that say nothing."""
    single = {bytes_: one for one, bytes_ in said(made).items()}
    as_bytes = given_.encode() if isinstance(given_, str) else given_
    ids = [len(made()) + 1] if as_bytes is None else [single[bytes([byte])] for byte in as_bytes]
    ids = ids * (2000 // len(ids))
    decode, work = made().decode, 0

    def counted(some: list[int]) -> str:
        nonlocal work
        work += len(some)
        return str(decode(some))

    monkeypatch.setattr(made(), "decode", counted)
    text, spans = decoded(ids, made())
    assert text == decode(ids) and len(spans) == len(ids)
    assert work < 20 * len(ids)
