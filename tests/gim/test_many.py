"""Lists of prompts: in padded batches, each result as if its prompt had run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import gim
from gim import many
from gim.parts import anatomy
from gim.targets import Continuation, Contrast, Token
from tests.families import SHARED, make, text_model, tokenizer
from tests.first import first

PROMPTS = [
    "The cat sat on the mat.",
    "The rat ate the cat and the cat sat on the rat. The mat",
    "A cat",
    "The cat ate the mat and the rat sat on the cat.",
    "\N{SNOWMAN}",
    "The rat sat on the mat.",
]


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model()


@contextmanager
def forwards(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the ids of every forward inside."""
    seen: list[tuple[int, ...]] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    try:
        yield seen
    finally:
        handle.remove()


def alone(model: Any, text: str, target: int | None = None, **options: Any) -> torch.Tensor:
    """The scores of one prompt, of ids, by the function that knows no text."""
    made = tokenizer()
    given = made(text, return_tensors="pt").input_ids
    return gim.explain(model, given, target_token_id=target, tokenizer=made, **options).float()


def assert_alike(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("rules", first(("GIM", "GIM_CONSTANT", "GRADIENT"), ("GIM",)))
def test_each_is_what_its_prompt_gives_alone(model: Any, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy.of(model).packing, "refused", "told to pad")
    with forwards(model) as seen:
        found = gim.attribute(model, tokenizer(), PROMPTS, rules=rules)
    batches = [shape for shape in seen if shape != (1, 1)]  # the baseline's embedding is looked up too
    assert len(batches) < len(PROMPTS) and sum(rows for rows, _ in batches) == len(PROMPTS)
    for text, one in zip(PROMPTS, found, strict=True):
        assert one.text == text and len(one.scores) == len(one.tokens)
        assert_alike(one.scores, alone(model, text, rules=rules))
        single = gim.attribute(model, tokenizer(), text, rules=rules)
        assert one.target.label == single.target.label and one.next_tokens[0].token == single.next_tokens[0].token
        assert one.target.value == pytest.approx(single.target.value, rel=1e-9)
        assert one.report.complete


def test_batches_are_sorted_by_length_and_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy.of(model).packing, "refused", "told to pad")
    lengths = {text: len(tokenizer()(text).input_ids) for text in PROMPTS}
    monkeypatch.setattr(many, "BATCH_TOKENS", 2 * max(lengths.values()))
    monkeypatch.setattr(many, "LEAST_FULL", 0.0)
    with forwards(model) as seen:
        found = gim.attribute(model, tokenizer(), PROMPTS)
    batches = [shape for shape in seen if shape != (1, 1)]
    assert all(rows * length <= many.BATCH_TOKENS for rows, length in batches) and 1 < len(batches) < len(PROMPTS)
    assert [length for _, length in batches] == sorted(length for _, length in batches)
    assert sum(rows for rows, _ in batches) == len(PROMPTS)
    assert [one.text for one in found] == PROMPTS
    # Padding is no more than a share.
    monkeypatch.setattr(many, "LEAST_FULL", 1.0)
    with forwards(model) as seen:
        gim.attribute(model, tokenizer(), [*PROMPTS, PROMPTS[0]])
    assert {shape[1] for shape in seen if shape[0] > 1} == {lengths[PROMPTS[0]]}
    # Logits of several rows at the places of all of them are bounded too.
    monkeypatch.setattr(many, "BATCH_LOGITS", 1)
    with forwards(model) as seen:
        gim.attribute(model, tokenizer(), PROMPTS)
    assert all(shape[0] == 1 for shape in seen)


def test_targets_of_several_kinds(model: Any) -> None:
    made = tokenizer()
    targets = [
        None,
        Contrast(" cat", " mat"),
        Continuation(" on the mat"),
        Token(7, "logprob"),
        9,
        Continuation([5, 6]),
    ]
    found = gim.attribute(model, made, PROMPTS, target=targets)
    for text, target, one in zip(PROMPTS, targets, found, strict=True):
        want = gim.attribute(model, made, text, target=target)
        assert one.target == pytest.approx(want.target) or one.target.label == want.target.label
        assert (one.text, one.tokens, one.target.token_ids) == (want.text, want.tokens, want.target.token_ids)
        assert one.target.value == pytest.approx(want.target.value, rel=1e-9)
        assert_alike(one.scores, want.scores)
    ids = torch.arange(5, 5 + len(PROMPTS))
    arrays: list[Any] = [ids, ids.numpy()]
    for array in arrays:  # as a list of them, and no continuation for all
        labels = [one.target.token_ids for one in gim.attribute(model, made, PROMPTS, target=array)]
        assert labels == [(one,) for one in ids.tolist()]
    same = gim.attribute(model, made, PROMPTS, target=" cat", segments=[{"all": (0, len(text))} for text in PROMPTS])
    assert {one.target.label for one in same} == {"' cat'"}
    assert [one.segments for one in same] == [{"all": (0, len(text))} for text in PROMPTS]


def test_chats_answers_and_progress(model: Any) -> None:
    made = tokenizer()
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
    for chat, one in zip(chats, gim.attribute(model, made, chats), strict=True):
        want = gim.attribute(model, made, chat)
        assert one.text == want.text and one.template == want.template and one.segments == want.segments
        assert_alike(one.scores, want.scores)

    seen: list[tuple[str, int, int]] = []
    answers = [" the cat", [5, 6, 7], " on"]
    found = gim.attribute(model, made, chats, answer=answers, progress=lambda *told: seen.append(told))
    for chat, answer, several in zip(chats, answers, found, strict=True):
        assert several == gim.attribute(model, made, chat, answer=answer)
    assert seen == [("prompts", done, 3) for done in range(4)]
    generated = gim.attribute(model, made, chats[:2], generate=2)
    assert [one.answer for one in generated] == [
        gim.attribute(model, made, chat, generate=2).answer for chat in chats[:2]
    ]


def test_a_bad_prompt_is_named_and_the_others_are_kept(model: Any) -> None:
    made = tokenizer()
    bad: list[Any] = [PROMPTS[0], "", PROMPTS[1], "cat " * 600]
    with pytest.raises(
        gim.PromptError, match=r"2 of 4 prompts could .*prompt\[1\]: prompt must not be empty; prompt\[3"
    ) as raised:
        gim.attribute(model, made, bad)
    error = raised.value
    assert isinstance(error, ValueError) and sorted(error.errors) == [1, 3]
    assert [one is None for one in error.results] == [False, True, False, True]
    for place in (0, 2):
        kept = error.results[place]
        assert isinstance(kept, gim.Attribution)
        assert_alike(kept.scores, alone(model, bad[place]))
    none: list[Any] = [PROMPTS[0], None, PROMPTS[1]]
    with pytest.raises(gim.PromptError, match=r"1 of 3 .*prompt\[1\]: ") as of_none:
        gim.attribute(model, made, none)
    assert [one is None for one in of_none.value.results] == [False, True, False]
    with pytest.raises(ValueError, match=r"^prompt must not be empty$"):
        gim.attribute(model, made, ["", ""])
    with pytest.raises(ValueError, match="rules must be") as of_all:
        gim.attribute(model, made, PROMPTS, rules="none such")
    assert not isinstance(of_all.value, gim.PromptError), "what is wrong with the call is no prompt's fault"
    with pytest.raises(ValueError, match=r"target must be one for all, or a list of 6, .*got a list of 2"):
        gim.attribute(model, made, PROMPTS, target=[1, 2])
    with pytest.raises(gim.PromptError, match=r"prompt\[1\]: segments\['a'\] must satisfy"):
        gim.attribute(model, made, PROMPTS[:2], segments=[{"a": (0, 3)}, {"a": (0, 999)}])


def test_what_is_wrong_in_a_batch_is_found_in_its_prompt(model: Any) -> None:
    """A prompt whose forward fails takes the batch with it, and only itself once each runs alone."""
    made = tokenizer()
    poison = made.encode(" rat", add_special_tokens=False)[-1]

    def spoil(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.where((given[0] == poison)[..., None], torch.nan, out)

    handle = model.get_input_embeddings().register_forward_hook(spoil)
    try:
        with pytest.raises(gim.PromptError) as raised:
            gim.attribute(model, made, PROMPTS)
    finally:
        handle.remove()
    spoilt = [place for place, text in enumerate(PROMPTS) if poison in made(text).input_ids]
    assert 0 < len(spoilt) < len(PROMPTS)
    assert sorted(raised.value.errors) == spoilt
    assert all(isinstance(one, FloatingPointError) for one in raised.value.errors.values())
    for place, text in enumerate(PROMPTS):
        kept = raised.value.results[place]
        if place not in spoilt:
            assert isinstance(kept, gim.Attribution)
            assert_alike(kept.scores, alone(model, text))


def test_an_interrupt_keeps_what_is_finished(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "BATCH_TOKENS", 1)

    def progress(_: str, done: int, __: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(gim.PromptsInterrupted) as raised:
        gim.attribute(model, tokenizer(), PROMPTS, progress=progress)
    finished = [one for one in raised.value.results if one is not None]
    assert len(finished) == 2 and len(raised.value.results) == len(PROMPTS)
    for one in finished:
        assert isinstance(one, gim.Attribution)
        assert_alike(one.scores, alone(model, one.text))


def test_a_model_that_cannot_be_padded_takes_rows_of_one_length_together() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**SHARED, "vocab_size": 320, "num_labels": 3}))
    model = model.double().eval()
    model.config.pad_token_id = None
    made = tokenizer()
    with forwards(model) as seen:
        found = gim.attribute(model, made, [*PROMPTS, PROMPTS[0]], target=1)
    assert (1, len(found[0])) in seen or any(rows == 1 for rows, _ in seen)
    for text, one in zip([*PROMPTS, PROMPTS[0]], found, strict=True):
        assert_alike(one.scores, gim.attribute(model, made, text, target=1).scores)


def test_an_encoder() -> None:
    model = make("bert-classifier")
    made = tokenizer()

    def limited(text: str, **named: Any) -> Any:
        encoded = type(made).__call__(made, text, **named)
        encoded["input_ids"] = [one % 97 for one in encoded["input_ids"]]
        return encoded

    class Small:
        """The tokenizer with ids of the model's small vocabulary."""

        is_fast, all_special_ids, mask_token_id = True, [0], None

        def __call__(self, text: str, **named: Any) -> Any:
            return limited(text, **named)

        def __getattr__(self, name: str) -> Any:
            return getattr(made, name)

    found = gim.attribute(model, Small(), PROMPTS, target=2, baseline=3)
    for text, one in zip(PROMPTS, found, strict=True):
        assert_alike(one.scores, gim.attribute(model, Small(), text, target=2, baseline=3).scores)
