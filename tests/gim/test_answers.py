"""Whole answers: every row is what a call of its own gives, under any plan, from one forward."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import warnings
from collections import UserList
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib.axes as axis
import numpy as np
import pytest
import torch
from markupsafe import escape
from rich.console import Console
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

import gim
from gim import circuits, memory, scoring
from gim.answering import WHOLE_ANSWER
from gim.inputs import check_ids
from gim.plan import PLANS, MemoryPlan
from gim.report import picture
from gim.report.facts import answer_facts
from gim.report.scale import Scale
from gim.report.text import one_line
from gim.targets import MEASURES, Continuation, Contrast
from tests.families import FAMILIES, ids, make, text_model, tokenizer
from tests.first import first
from tests.gim.test_cli import run
from tests.gim.test_memory import EVERYTHING, SOME, every_plan
from tests.live import peak_bytes
from tests.oracle import FLOAT64_PLAN_RELATIVE, assert_close64

PROMPT = "The cat sat on the mat and ate the"
ANSWER = " rat. The cat"
BASELINE, FIRST, COUNT = 3, 12, 5


def several(
    model: Any, tokens: torch.Tensor, plan: MemoryPlan, at_once: int, rules: str = "GIM", progress: Any = None
) -> scoring.Result:
    """The last COUNT positions of one row explained each by itself, and their sum as log-odds."""
    row, _ = check_ids(model, tokens, None)
    at = torch.arange(row.shape[1] - COUNT, row.shape[1])[None]
    terms = scoring.Terms(at, torch.full_like(at, 7), torch.ones_like(at), "logit", "logodds")
    request = scoring.Request.of(row, None, terms)
    return scoring.run(model, request, BASELINE, gim.rules.get(rules), plan, progress, at_once=at_once)


def alone(model: Any, tokens: torch.Tensor, rules: str = "GIM") -> torch.Tensor:
    """The same rows by calls of their own, ``[COUNT, T]``."""
    length = tokens.shape[1]
    rows = []
    for last in range(length - COUNT, length):
        found = gim.explain(
            model, tokens[:, : last + 1], target_token_id=7, baseline_token_id=BASELINE, rules=rules, memory="none"
        )
        rows.append(torch.nn.functional.pad(found, (0, length - 1 - last)))
    return torch.stack(rows)


@pytest.mark.parametrize("family", first(FAMILIES, ("gemma2", "gpt2")))
def test_rows_are_those_of_calls_of_their_own(family: str) -> None:
    model, tokens = make(family), ids(1, FIRST + COUNT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = alone(model, tokens)
        for plan, at_once in ((EVERYTHING, 1), (PLANS[0], 4), (MemoryPlan("layer", True), 4)):
            found = several(model, tokens, plan, at_once)
            assert_close64(found.scores[:COUNT], want, f"{plan.name} {at_once}", relative=FLOAT64_PLAN_RELATIVE)


@pytest.mark.parametrize(
    ("at_once", "plans"),
    [
        pytest.param(4, SOME, id="4"),
        *(pytest.param(count, SOME, id=str(count), marks=pytest.mark.slow) for count in (1, 2, COUNT + 1, 16)),
        pytest.param(3, every_plan(), id="every plan", marks=pytest.mark.slow),
    ],
)
def test_every_plan_gives_the_same_rows(at_once: int, plans: Sequence[MemoryPlan]) -> None:
    model, tokens = make("llama"), ids(1, FIRST + COUNT)
    want = several(model, tokens, EVERYTHING, 1)
    for plan in plans:
        found = several(model, tokens, plan, at_once)
        assert_close64(found.scores, want.scores, plan.name, relative=FLOAT64_PLAN_RELATIVE)
        assert_close64(found.values, want.values, plan.name, relative=FLOAT64_PLAN_RELATIVE)


@pytest.mark.parametrize(
    "plans", [pytest.param(SOME[1::2], id="some"), pytest.param(every_plan(), id="every plan", marks=pytest.mark.slow)]
)
def test_an_interrupt_leaves_the_first_rows_and_their_sum(plans: Sequence[MemoryPlan]) -> None:
    """Wherever in the backwards it comes: what is left is the result for the rows that were finished."""
    model, tokens = make("llama"), ids(1, FIRST + COUNT)
    layers = len(model.model.layers)
    whole = several(model, tokens, EVERYTHING, 1)
    row, _ = check_ids(model, tokens, None)

    @functools.cache
    def sum_of(finished: int) -> scoring.Result:
        at = torch.arange(FIRST, FIRST + finished)[None]
        terms = scoring.Terms(at, torch.full_like(at, 7), torch.ones_like(at), "logodds")
        asked = scoring.Request.of(row, None, terms)
        return scoring.run(model, asked, BASELINE, gim.rules.get("GIM"), EVERYTHING, None)

    for plan in plans:
        want = several(model, tokens, plan, 1)
        for at_once, after in ((1, layers), (1, 2 * layers + 1), (2, layers + 1), (1, COUNT * layers + 1)):
            came: list[int] = []

            def interrupt(stage: str, done: int, _: int, after: int = after, came: list[int] = came) -> None:
                if stage == "backward" and done == after + 1 and not came:
                    came.append(done)
                    raise KeyboardInterrupt

            found = several(model, tokens, plan, at_once, progress=interrupt)
            finished = after // layers * at_once
            assert len(found.scores) == finished + 1, (plan.name, at_once, after)
            assert_close64(found.scores[:-1], want.scores[:finished], plan.name, relative=FLOAT64_PLAN_RELATIVE)
            assert_close64(found.values[:-1], want.values[:finished], plan.name, relative=FLOAT64_PLAN_RELATIVE)
            total = sum_of(finished)
            assert_close64(found.scores[-1:], total.scores, plan.name, relative=FLOAT64_PLAN_RELATIVE)
            assert_close64(found.values[-1:], total.values, plan.name, relative=FLOAT64_PLAN_RELATIVE)
    # Nothing of the interrupts is left.
    assert_close64(several(model, tokens, EVERYTHING, 1).scores, whole.scores, "after", relative=FLOAT64_PLAN_RELATIVE)


def test_an_interrupt_before_any_row_is_an_interrupt() -> None:
    def interrupt(stage: str, *_: int) -> None:
        if stage == "backward":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        several(make("llama"), ids(1, FIRST + COUNT), EVERYTHING, 1, progress=interrupt)


def test_an_interrupt_of_what_was_not_watched_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that calls what no watched forward called runs once more: rows that were finished before are not given."""
    model, tokens = make("llama"), ids(1, FIRST + COUNT)

    class Layer(type(model.model.layers[-1])):
        def forward(self, x: torch.Tensor, *given: Any, **named: Any) -> Any:
            return super().forward(x.flip(0).flip(0) if "TURNED" in os.environ else x, *given, **named)

    model.model.layers[-1].__class__ = Layer
    stops: list[int] = []

    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "backward" and done in stops:
            raise KeyboardInterrupt

    several(model, tokens, EVERYTHING, 1, progress=interrupt)
    stops.append(len(model.model.layers) + 1)
    assert len(several(model, tokens, EVERYTHING, 1, progress=interrupt).scores) == 2
    monkeypatch.setenv("TURNED", "twice")
    with pytest.raises(KeyboardInterrupt):
        several(model, tokens, EVERYTHING, 1, progress=interrupt)
    assert len(several(model, tokens, EVERYTHING, 1, progress=interrupt).scores) == 2  # watched now


def test_a_cut_answer_is_the_answers_beginning(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_AT_ONCE", 2)
    made, layers = tokenizer(), len(model.model.layers)
    given = made.encode(ANSWER, add_special_tokens=False)

    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "backward" and done == layers + 1:
            raise KeyboardInterrupt

    with pytest.raises(gim.AnswerInterrupted) as raised:
        gim.attribute(model, made, PROMPT, answer=ANSWER, progress=interrupt)
    cut = raised.value.attribution
    note = f"interrupted: the first {len(cut)} of {len(given)} tokens of the answer are explained"
    assert any(one.startswith(note) for one in cut.prompt.report.notes)
    for view in (printed(cut, 200), cut.to_html(), cut.to_json(), cut._repr_html_()):
        assert note in view
    want = gim.attribute(model, made, PROMPT, answer=given[: len(cut)])
    assert 0 < len(cut) < len(given) and (cut.answer, cut.tokens, cut.offsets) == (
        want.answer,
        want.tokens,
        want.offsets,
    )
    for name in ("scores", "total"):
        torch.testing.assert_close(getattr(cut, name), getattr(want, name), rtol=1e-6, atol=1e-6)
    assert cut.prompt.target.value == pytest.approx(want.prompt.target.value, rel=1e-9)
    assert gim.AnswerAttribution.from_json(cut.to_json()) == cut


def test_one_forward_and_its_backwards_are_told_of() -> None:
    heard: list[tuple[str, int, int]] = []
    model = make("llama")
    layers = len(model.model.layers)
    several(model, ids(1, 20), MemoryPlan("layer"), 2, progress=lambda *told: heard.append(told))
    backwards = [told for told in heard if told[0] == "backward"]
    assert [told for told in heard if told[0] == "forward"][-1] == ("forward", layers, layers)
    assert backwards == [("backward", done, 3 * layers) for done in range(1, 3 * layers + 1)]


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_by_their_formulas(measure: str) -> None:
    model, row, target = make("gpt2"), ids(1, 14), 7  # whose norms run in float64 where the model does
    at = torch.tensor([[13]])
    terms = scoring.Terms(at, torch.tensor([[target]]), torch.tensor([[1]]), measure)
    got = scoring.run(model, scoring.Request.of(row, None, terms), BASELINE, gim.rules.GRADIENT, EVERYTHING, None)

    embedding = model.get_input_embeddings()
    leaf = embedding(row).detach().requires_grad_()
    logits = model(inputs_embeds=leaf).logits[0, -1]
    p = logits.softmax(-1)[target]
    value = {"logit": logits[target], "logprob": p.log(), "logodds": (p / (1 - p)).log()}[measure]
    (grad,) = torch.autograd.grad(value, leaf)
    want = ((leaf - embedding(torch.tensor(BASELINE))) * grad).sum(-1).detach()
    assert_close64(got.values, value.detach()[None], measure, relative=FLOAT64_PLAN_RELATIVE)
    assert_close64(got.scores, want, measure, relative=FLOAT64_PLAN_RELATIVE)


def test_log_odds_stay_finite_where_a_token_is_certain() -> None:
    logits = torch.tensor([[[200.0, 0.0, -1.0]]], requires_grad=True)
    value = scoring._measured(logits, torch.tensor([[0]]), "logodds")
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert float(value.detach()) == pytest.approx(200 - torch.tensor([0.0, -1.0]).logsumexp(-1).item())
    assert grad[0, 0].tolist() == pytest.approx([1, *(-torch.tensor([0.0, -1.0]).softmax(-1)).tolist()])


class Careful(torch.autograd.Function):
    """The identity, whose backward looks at a number, which several gradients taken together do not have."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        assert grads[0].sum().item() == grads[0].sum().item()
        return grads[0]


def test_what_cannot_be_taken_together_is_taken_one_by_one() -> None:
    model, tokens = make("llama"), ids(1, FIRST + COUNT)
    want = several(model, tokens, EVERYTHING, 1)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(Careful.apply(x))
    with pytest.warns(UserWarning, match="gradients are taken one by one, for several at once fail: "):
        found = several(model, tokens, EVERYTHING, 4)
    assert torch.equal(found.scores, want.scores)


def test_memory_that_is_too_little_for_several_may_be_enough_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make("llama"), ids(1, FIRST + COUNT)
    want = several(model, tokens, EVERYTHING, 1)
    backward = torch.autograd.grad

    def too_large(numbers: Any, leaf: Any, seeds: Any, **named: Any) -> Any:
        if torch._C._functorch.is_batchedtensor(seeds):
            raise torch.OutOfMemoryError("out of memory. Tried to allocate")
        return backward(numbers, leaf, seeds, **named)

    monkeypatch.setattr(torch.autograd, "grad", too_large)
    with pytest.warns(UserWarning, match="several at once fail: out of memory"):
        found = several(model, tokens, EVERYTHING, 4)
    assert torch.equal(found.scores, want.scores)


def test_half_precision_finds_its_seed_for_all_rows() -> None:
    model, tokens = make("llama", torch.float16), ids(1, FIRST + COUNT)
    found = several(model, tokens, PLANS[0], 4)
    for row, one in zip(found.scores, alone(model, tokens), strict=False):
        torch.testing.assert_close(row, one, rtol=0.02, atol=0.02 * float(one.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "layer", "layer+attention+tile=64"])
def test_an_answer_takes_one_attributions_memory_and_its_gradients(plan: str) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 9}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=3, **settings)).eval()
    length = 256
    row, at = ids(1, length), torch.arange(length - COUNT, length)[None]

    def peak(total: Any, at_once: int) -> int:
        terms = scoring.Terms(at, torch.full_like(at, 7), torch.ones_like(at), "logit", total)
        request = scoring.Request.of(row, None, terms)
        chosen = MemoryPlan.parse(plan)
        run = lambda: scoring.run(model, request, BASELINE, gim.rules.GIM, chosen, None, at_once=at_once)  # noqa: E731
        run()
        return peak_bytes(run)[0]

    alone, each = peak(None, 1), memory.gradient_bytes(model, length)
    assert each is not None
    for at_once in (1, 2, COUNT):
        assert peak("logodds", at_once) <= alone + at_once * each, at_once


# ------------------------------------------------------------------------------------------------------- the result


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model()


@pytest.fixture(scope="module")
def answer(model: Any) -> gim.AnswerAttribution:
    return gim.attribute(model, tokenizer(), PROMPT, answer=ANSWER)


def test_an_answer_as_text_ids_and_rows(model: Any, answer: gim.AnswerAttribution) -> None:
    made = tokenizer()
    given = made.encode(ANSWER, add_special_tokens=False)
    assert answer.prompt.target.token_ids == tuple(given) and answer.answer == ANSWER
    assert answer.text == PROMPT + ANSWER and "".join(answer.tokens) == ANSWER
    assert answer.scores.shape == (len(given), len(answer.prompt) + len(given))
    assert gim.attribute(model, made, PROMPT, answer=given) == answer
    continued = gim.attribute(model, made, PROMPT, target=Continuation(given))
    for kind in (torch.tensor, np.array, tuple, UserList):
        as_kind: Any = kind(given)
        assert gim.attribute(model, made, PROMPT, answer=as_kind) == answer
        assert gim.attribute(model, made, PROMPT, target=as_kind) == continued
    before = made(PROMPT).input_ids
    for place, one in enumerate(given):
        row = answer.row(place)
        ids_before = torch.tensor([before + given[:place]])
        want = gim.explain(model, ids_before, target_token_id=one, baseline_token_id=row.baseline[0], memory="none")
        torch.testing.assert_close(row.scores, want.float(), rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert row.token_ids == tuple(before + given[:place]) and row.text == PROMPT + "".join(answer.tokens[:place])
        assert row.target.token_ids == (one,) and row.target.measure == "logit"
        assert not answer.scores[place, len(before) + place :].any()
        likeliest = model(ids_before).logits[0, -1].softmax(-1).topk(5)
        assert [next.token_id for next in row.next_tokens] == list(dict.fromkeys([*likeliest.indices.tolist(), one]))
    with pytest.raises(IndexError, match="place must be in"):
        answer.row(len(given))
    assert answer.row(np.int64(1)) == answer.row(1)
    for no_place in ("0", 1.5, True):
        with pytest.raises(TypeError, match="place must be a whole number, got"):
            answer.row(no_place)


@pytest.mark.parametrize("measure", [None, *MEASURES])
def test_the_whole_answer_is_the_sum_under_its_measure(model: Any, measure: Any) -> None:
    made = tokenizer()
    found = gim.attribute(model, made, PROMPT, answer=ANSWER, measure=measure)
    whole = measure or WHOLE_ANSWER
    want = gim.attribute(model, made, PROMPT, target=gim.targets.Continuation(ANSWER, whole))
    torch.testing.assert_close(found.total[:-1], want.scores, rtol=1e-5, atol=1e-5 * float(want.scores.abs().max()))
    assert found.prompt.target.measure == whole and found.targets[0].measure == (measure or "logit")
    assert found.prompt.target.value == pytest.approx(want.target.value, rel=1e-9)
    assert torch.equal(found.prompt.scores, found.total[: len(found.prompt)])
    if measure is not None:
        torch.testing.assert_close(found.scores.sum(0), found.total, rtol=1e-5, atol=1e-5)


def test_a_generated_answer_is_what_the_model_says(model: Any) -> None:
    made = tokenizer()
    found = gim.attribute(model, made, PROMPT, generate=6)
    given = made(PROMPT, return_tensors="pt")
    said = model.generate(**given, max_new_tokens=6, pad_token_id=0)[0, given.input_ids.shape[1] :].tolist()
    ended = next((place for place, one in enumerate(said) if one == model.generation_config.eos_token_id), len(said))
    assert list(found.prompt.target.token_ids) == said[:ended] and 0 < len(found) <= 6
    assert found == gim.attribute(model, made, PROMPT, answer=said[:ended])


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_an_answer_has_no_token_that_ends_it(model: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = gim.attribute(model, tokenizer(), PROMPT, generate=6).prompt.target.token_ids
    first = next(place for place in range(1, 6) if said[place] not in said[:place])
    monkeypatch.setattr(model.generation_config, "eos_token_id", kind([said[first]]))
    found = gim.attribute(model, tokenizer(), PROMPT, generate=6)
    assert found.prompt.target.token_ids == said[:first]


def test_what_does_not_begin_with_the_prompt_is_no_answer(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model.generate
    monkeypatch.setattr(model, "generate", lambda **named: own(**named)[:, named["input_ids"].shape[1] :])
    with pytest.raises(ValueError, match="what LlamaForCausalLM generates does not begin with its prompt, .* give ans"):
        gim.attribute(model, tokenizer(), PROMPT, generate=30)


def test_a_generated_answer_ends_where_the_models_stop_strings_say(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = gim.attribute(model, tokenizer(), PROMPT, generate=6)
    stop = next(one for one in said.tokens[1:] if one.strip() and one not in said.tokens[0])
    monkeypatch.setattr(model.generation_config, "stop_strings", [stop])
    found = gim.attribute(model, tokenizer(), PROMPT, generate=6)
    first = said.tokens.index(stop) + 1
    assert first < len(said) and found.tokens == said.tokens[:first]


def test_characters_of_several_tokens(model: Any) -> None:
    made = tokenizer()
    given = made.encode("日 \U0001f600", add_special_tokens=False)
    found = gim.attribute(model, made, PROMPT, answer=given)
    assert found.answer == "日 \U0001f600" and len(found) > 3
    assert [found.row(place).text for place in range(len(found))][-1].startswith(PROMPT)
    assert sum(span.score for span in found.to_table("word", "word").rows) == pytest.approx(
        float(found.total[len(found.prompt) :].sum()), abs=1e-4
    )


@pytest.mark.parametrize("rows", ["token", "word", "sentence", "segment"])
@pytest.mark.parametrize("columns", ["token", "word", "sentence", "segment"])
def test_tables_add_up_and_never_mix_prompt_and_answer(model: Any, rows: Any, columns: Any) -> None:
    parts = {"first": (0, 11), "second": (11, len(PROMPT))}
    found = gim.attribute(model, tokenizer(), PROMPT, answer=ANSWER, segments=parts)
    table = found.to_table(rows, columns)
    assert table.scores.shape == (len(table.rows), len(table.prompt) + len(table.answer))
    first = len(found.prompt)
    kept = torch.tensor([not (one and columns != "token") for one in found.prompt.aside])
    want = found.scores[:, :first][:, kept].sum() + found.scores[:, first:].sum()
    assert float(table.scores.sum()) == pytest.approx(float(want), abs=1e-4)
    assert all(PROMPT[span.start : span.end].strip() == span.text.strip() for span in table.prompt if span.end)
    assert all(ANSWER[span.start : span.end] == span.text for span in table.answer)
    if columns == "segment":
        assert [span.name for span in (*table.prompt, *table.answer)] == ["first", "second", "answer"]
    # One cell by hand: the whole of the answer's last token for everything before it.
    if rows == columns == "token":
        assert torch.allclose(table.scores, found.scores)


def test_answers_as_json_and_data_frames(answer: gim.AnswerAttribution, tmp_path: Any) -> None:
    path = tmp_path / "answer.json"
    assert answer.to_json(path) == path.read_text()
    assert gim.AnswerAttribution.from_json(path) == answer == gim.AnswerAttribution.from_json(answer.to_json())
    assert json.loads(answer.to_json()) == answer.to_dict()
    frame = answer.to_dataframe()
    pairs = [(row, column) for row in range(len(answer)) for column in range(len(answer.prompt) + row)]
    assert list(zip(frame["answer_position"], frame["position"], strict=True)) == pairs
    assert frame["score"].tolist() == [float(answer.scores[pair]) for pair in pairs]
    assert set(frame[frame["part"] == "answer"]["token"]) <= set(answer.tokens)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schema", "other", "is not an answer's attribution: it has no field schema"),
        ("schema_version", 9, "has schema version 9"),
        ("scores", [[1.0]], "field 'scores' must have"),
        ("scores", [[float("nan")]], "not JSON|NaN|finite"),
        ("total", "x", "field 'total' must be a list"),
        ("tokens", ["a"], "entry for each|must be float32 of shape"),
        ("offsets", [[0, 999]] * 5, "outside the answer|entry for each"),
        ("prompt", {}, "prompt of the text is not an attribution"),
        ("targets", [{}], "field 'targets' entry 0"),
    ],
)
def test_documents_that_are_no_answers(answer: gim.AnswerAttribution, field: str, value: Any, message: str) -> None:
    fields = {**answer.to_dict(), field: value}
    with pytest.raises(ValueError, match=message):
        gim.AnswerAttribution.from_json("\n" + json.dumps(fields))
    missing = {name: one for name, one in answer.to_dict().items() if name != field}
    with pytest.raises(ValueError, match="schema|is missing"):
        gim.AnswerAttribution.from_json("\n" + json.dumps(missing))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"answer": ""}, ValueError, "answer must have at least one token"),
        ({"answer": []}, ValueError, "answer must have at least one token"),
        ({"answer": [1.5]}, TypeError, "answer must be text or a list of token ids, got 1.5"),
        ({"answer": 3}, TypeError, "answer must be text or a list of token ids, got 3"),
        ({"answer": np.array([1.5])}, TypeError, "answer must be text or a list of token ids, got .*1.5.* among them"),
        ({"answer": np.array([[5, 6]])}, TypeError, r"answer must be text or a list of token ids, got array\(\[\["),
        (
            {"answer": np.array([True])},
            TypeError,
            "answer must be text or a list of token ids, got .*True.* among them",
        ),
        ({"answer": b"ab"}, TypeError, "answer must be text or a list of token ids, got b'ab'"),
        ({"target": b"ab"}, TypeError, "target must be a token id, text, ids or a Target, got bytes"),
        ({"answer": "a\udcff"}, ValueError, r"answer must be text, and '\\udcff' at character 1 of it is no"),
        ({"target": "\udcff"}, ValueError, r"target must be text, and '\\udcff' at character 0 of it is no"),
        ({"target": Contrast("a", "\udcff")}, ValueError, r"against must be text, and '\\udcff' at character 0"),
        ({"baseline": "\udcff"}, ValueError, r"baseline must be text, and '\\udcff' at character 0"),
        ({"answer": [99999]}, ValueError, "answer must be a token id in"),
        ({"generate": 0}, ValueError, "generate must be at least 1 token, got 0"),
        ({"generate": 2.0}, TypeError, "generate must be a number of tokens"),
        ({"generate": True}, TypeError, "generate must be a number of tokens"),
        ({"answer": "a", "generate": 2}, ValueError, "answer and generate cannot both be given"),
        ({"answer": "a", "target": " cat"}, ValueError, "target is one token's"),
        ({"generate": 2, "position": -1}, ValueError, "position is one token's"),
        ({"answer": "a", "measure": "loss"}, ValueError, "measure must be one of"),
    ],
)
def test_what_is_no_answer(model: Any, given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gim.attribute(model, tokenizer(), PROMPT, **given)


@pytest.mark.parametrize("name", ["generate", "answer", "target"])
def test_what_is_too_long_is_refused_before_any_work(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer()
    prompt, limit = len(made("The cat").input_ids), 16
    monkeypatch.setattr(model.config, "max_position_embeddings", limit)
    given: Any = {"generate": lambda n: n, "answer": lambda n: [84] * n, "target": lambda n: Continuation([84] * n)}

    def ask(count: int, **options: Any) -> Any:
        return gim.attribute(model, made, "The cat", **{name: given[name](count)}, **options)

    most = limit - prompt + 1  # the last one is not read
    ask(most)
    ask(most + 1, allow_extrapolation=True)
    with monkeypatch.context() as nothing:
        for one in ("forward", "generate"):
            nothing.setattr(model, one, lambda *_, **__: pytest.fail("the model ran"))
        nothing.setattr(made, "decode", lambda *_, **__: pytest.fail("ids were decoded"))
        with pytest.raises(
            ValueError, match=f"the prompt has {prompt} tokens and {name} {most + 1} more, and LlamaFor.* 16"
        ):
            ask(most + 1)
        monkeypatch.setattr(model.config, "max_position_embeddings", prompt - 1)
        with pytest.raises(ValueError, match=f"the prompt has {prompt} tokens, and LlamaFor.* has {prompt - 1} pos"):
            ask(1)


def test_arguments_that_do_not_fit_are_named(model: Any) -> None:
    made = tokenizer()
    with pytest.raises((TypeError, ValueError), match="prompt must be .* a list of such, got an empty list"):
        gim.attribute(model, made, [])
    at: Any = np.int64(2)
    assert gim.attribute(model, made, PROMPT, position=at) == gim.attribute(model, made, PROMPT, position=2)
    with pytest.raises(TypeError, match="progress must be a function or None, got 3"):
        gim.evaluate(model, made, [PROMPT], progress=3)
    pair = circuits.Pair([5, 6, 7], [5, 8, 7], 9, 10)
    with pytest.raises(TypeError, match="progress must be a function or None, got 3"):
        circuits.attribute(model, [pair], progress=3)
    with pytest.raises(ValueError, match=r"pairs\[1\]: clean and corrupted are the same tokens"):
        circuits.attribute(model, [pair, circuits.Pair([5, 6], [5, 6], 9, 10)])
    found = circuits.attribute(model, [pair])
    for top in (found.top, found.top_nodes):
        with pytest.raises(ValueError, match=r"n must be in 1\.\.\d+, as many \w+ as there are, got 0"):
            top(0)


def test_bytes_are_no_ids() -> None:
    with pytest.raises(TypeError, match="tokens of a Continuation must be text or a list of token ids, got b'ab'"):
        Continuation(b"ab")
    with pytest.raises(TypeError, match=r"pairs\[0\].clean must be text or a list of token ids"):
        circuits.attribute(text_model(), [circuits.Pair(b"ab", [1, 2], 1, 2)])


def test_models_that_give_no_answers() -> None:
    from transformers import BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = BertForMaskedLM(BertConfig(vocab_size=320, **sizes)).eval()
    with pytest.raises(ValueError, match="answer needs a model that says the next token, and BertForMaskedLM says"):
        gim.attribute(encoder, tokenizer(), PROMPT, answer=ANSWER)


def test_classes_of_tokens_are_no_tokens() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    tagger = BertForTokenClassification(BertConfig(vocab_size=320, **sizes)).eval()
    for given in ({}, {"target": 1}, {"answer": ANSWER}):
        arguments: Any = given
        with pytest.raises(ValueError, match="BertForTokenClassification says a?.*class of each token"):
            gim.attribute(tagger, tokenizer(), PROMPT, **arguments)
    for target in (None, 1):
        with pytest.raises(ValueError, match="BertForTokenClassification says a class of each token"):
            gim.explain(tagger, torch.arange(5), target_token_id=target, baseline_token_id=3)


# ------------------------------------------------------------------------------------------------------------ looks


def test_a_page_of_an_answer(answer: gim.AnswerAttribution, tmp_path: Any) -> None:
    page = answer.to_html(tmp_path / "page.html")
    assert page == (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('role="button"') == len(answer)
    data = json.loads(page.split('id="said">')[1].split("</script>")[0])
    assert data["prompt"] == len(answer.prompt) and len(data["rows"]) == len(answer)
    for place, row in enumerate(data["rows"]):
        want = answer.row(place)
        assert row["limit"] == Scale.of(want).limit
        # As the page shows them, so that nothing is rounded twice.
        assert row["scores"] == [float(f"{score:.3g}") for score in want.scores.tolist()]
        for name, value in answer_facts(want):
            assert f"<dt>{name}</dt><dd>{escape(one_line(value))}</dd>" in page
    assert "http" not in page.replace("http-equiv", "")


def test_views_show_every_token_of_an_answer_and_no_character_twice(model: Any) -> None:
    """Bytes of one character, and an id that the tokenizer does not have."""
    made = tokenizer()
    unknown = len(made)
    found = gim.attribute(model, made, PROMPT, answer=[*made.encode("日a", add_special_tokens=False), unknown])
    shown = ["日", "·", "·", "a", f"⟨{unknown}⟩"]
    page = found.to_html().split('id="answer"')[1].split("</div>")[0]
    assert re.findall(r'<span id="a\d" role="button"[^>]*>([^<]*)</span>', page) == shown
    assert found.tokens == ("日", "日", "日", "a", shown[-1])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    table = console.export_text().split("strongest before it")[1].splitlines()
    assert [line.split()[0] for line in table[2 : 2 + len(shown)]] == shown
    # As a continuation's part it stands in the prompt's own panel.
    continued = gim.attribute(model, made, PROMPT, target=Continuation([unknown, unknown]))
    assert f">⟨{unknown}⟩</span>" in continued.to_html()
    assert continued.target.tokens == (shown[-1],) * 2 and continued.target.label == repr(2 * shown[-1])


def printed(found: Any, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_the_table_of_parts_has_every_score_whole(model: Any, width: int) -> None:
    said = " the rat and the mat and the cat and the rat and the mat and the cat and the rat. It sat."
    named = {"a passage with a long name": (0, 11), "b": (11, 22)}
    found = gim.attribute(model, tokenizer(), PROMPT, answer=said, segments=named)
    _, shown = printed(found, width).split("What each sentence of")
    wanted = [f"{score:+.3g}" for row in found.to_table("sentence", "segment").scores.tolist() for score in row]
    lines = shown.split("sentence ")[1].splitlines()[2:]
    assert [line.split()[-1] for line in lines if re.search(r"[-+][\d.e-]+ *$", line)][: len(wanted)] == [
        one if one != "+0" else "0" for one in wanted
    ]
    assert "It sat." in shown and max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_what_tokens_were_made_of_has_whole_numbers_and_places(answer: gim.AnswerAttribution, width: int) -> None:
    shown = printed(answer, width).split("strongest before it")[1].splitlines()[2 : 2 + len(answer)]
    first = len(answer.prompt)
    for place, line in enumerate(shown):
        items = [
            f"at {one.position if one.position < first else f'answer {one.position - first}'} {one.score:+.3g}"
            for one in answer.row(place).top(4)
        ]
        found = re.findall(r"at (?:answer )?\d+ [-+][^ ,]+", line)
        assert found and found == items[: len(found)], line
        assert "\u2026" not in line or len(found) == 1
        assert width < 120 or len(found) == 4


@pytest.mark.parametrize("measure", ["logit", "logprob", "logodds"])
def test_a_token_that_is_not_likely_has_its_probability(model: Any, measure: Any) -> None:
    made = tokenizer()
    before, least = made(PROMPT).input_ids, model(torch.tensor([made(PROMPT).input_ids])).logits[0, -1].softmax(-1)
    found = gim.attribute(model, made, PROMPT, answer=[int(least.argmin())], measure=measure)
    assert before and f", {100 * float(least.min()):.3g} %. " in found.to_html()
    assert [one.token_id for one in found.next_tokens[0]] == [*least.topk(5).indices.tolist(), int(least.argmin())]
    said = dict(answer_facts(found.prompt))["Likeliest first"]
    assert said.endswith(
        f" %; the answer's own {made.decode([int(least.argmin())])!r} {100 * float(least.min()):.3g} %"
    )


def test_every_table_of_parts_names_its_measure(model: Any) -> None:
    """Rows of an answer are logits, and the whole of it is not."""
    named = {"first": (0, 11), "second": (11, 22)}
    found = gim.attribute(model, tokenizer(), PROMPT, answer=ANSWER, segments=named)
    shown, page = printed(found, 100), found.to_html()
    assert "owes to which part: logit" in shown and "Parts of the prompt: log-odds" in shown
    for title, measure in (("owes to which part", "Logit"), ("Parts of the prompt for the whole answer", "Log-odds")):
        assert f'<th class="r">{measure}</th>' in page.split(f"{title}</h2>")[1].split("</thead>")[0]
    # Of the first sentence there is no answer before it, but its own tokens.
    for view in (shown, page):
        assert "earlier tokens" in view and "the answer before it" not in view


def test_a_long_answer_stands_once_on_every_view(model: Any) -> None:
    """What is explained is its beginning in the heading, and its length beside its number."""
    said = " the rat and the mat" * 12 + " and it is the end"
    found = gim.attribute(model, tokenizer(), PROMPT, answer=said)
    page = found.to_html()
    heading = page.split("</small>")[1].split("</h1>")[0]
    assert 20 < len(heading) < 90 and heading.endswith("\u2026")
    target = f"the whole answer, {len(found)} tokens, log-odds {found.prompt.target.value:.4g}"
    assert f"<dt>Target</dt><dd>{target}</dd>" in page
    shown = " ".join(printed(found, 80).split())
    assert target in shown and shown.count("and it is the end") == 1
    assert target in found._repr_html_()


def test_line_ends_of_an_answer_can_be_chosen_and_lines_have_their_direction(model: Any) -> None:
    found = gim.attribute(model, tokenizer(), PROMPT, answer="one\n\ntwo")
    page = found.to_html().split('id="answer"')[1].split("<p")[0]
    assert page.count('<div dir="auto">') == 2 + ("\n" in found.tokens)
    assert all("<b></b>" in one for one in re.findall(r'<span id="a\d+"[^>]*>(.*?)</span>', page, re.S) if "\n" in one)
    assert page.count("<b></b>") == 2


def test_the_page_escapes_what_an_answer_says(model: Any) -> None:
    found = gim.attribute(model, tokenizer(), PROMPT, answer="</script><b>\u202e")
    page = found.to_html()
    assert "</script><b>" not in page and "\u202e" not in page
    cell = found._repr_html_()
    assert "</script><b>" not in cell and "\u202e" not in cell and "&lt;" in cell


def test_pictures_and_notebooks_begin_with_the_answer(model: Any, tmp_path: Any, monkeypatch: Any) -> None:
    named = {"first": (0, 11), "second": (11, 22)}
    found = gim.attribute(model, tokenizer(), PROMPT, answer=ANSWER, segments=named)
    cell = found._repr_html_()
    places = [cell.index(one) for one in (" rat</span>", " mat</span>", "owes to which part: logit", "Likeliest")]
    assert places == sorted(places), places
    drawn: list[str] = []
    for name, place in (("text", 2), ("set_title", 0)):
        own = getattr(axis.Axes, name)

        def write(self: Any, *given: Any, own: Any = own, place: int = place, **named: Any) -> Any:
            drawn.append(given[place])
            return own(self, *given, **named)

        monkeypatch.setattr(axis.Axes, name, write)
    found.to_png(tmp_path / "a.png")
    parts = ["The answer", "The prompt", "What each sentence of the answer owes to which part: logit", "first"]
    parts += ["Scores along the prompt, by token", "Strongest tokens, in context"]
    at = [drawn.index(one) for one in parts]
    assert at == sorted(at) and max(at) < next(i for i, one in enumerate(drawn) if one.startswith("Likeliest"))


def test_a_picture_marks_what_is_set_aside(answer: gim.AnswerAttribution) -> None:
    aside = replace(answer.prompt, template=(*(False for _ in answer.prompt.tokens[1:]), True))
    (row,) = picture._picture_rows(aside, Scale.of(aside))
    assert [cell.level is None for cell in row] == [*aside.aside] and aside.aside[-1]
    assert picture.png(aside) != picture.png(answer.prompt)


def test_the_command_line_keeps_what_is_finished(
    model: Any, answer: gim.AnswerAttribution, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")

    told = "interrupted: the first 4 of 9 tokens of the answer"

    def cut(*_: Any, **__: Any) -> None:
        raise gim.AnswerInterrupted(answer, told)

    monkeypatch.setattr("gim.attribute", cut, raising=False)
    kept = str(tmp_path / "a.json")
    out = run("explain", "--model", str(tmp_path / "model"), "-p", PROMPT, "--answer", ANSWER, "--json", kept)
    assert out.code == 130 and "What each token was made of" in out.out and told in out.err
    assert gim.AnswerAttribution.from_json(kept) == answer


def test_the_command_line_explains_answers(model: Any, tmp_path: Any) -> None:
    folder, made = tmp_path / "model", tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    common = ("explain", "--model", str(folder), "--prompt", PROMPT, "--json")
    asked: list[tuple[Sequence[str], dict[str, Any]]] = [
        (("--answer", ANSWER), {"answer": ANSWER}),
        (("--generate", "4", "--measure", "logprob"), {"generate": 4, "measure": "logprob"}),
    ]
    for arguments, same in asked:
        out = run(*common, str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"), *arguments)
        assert out.code == 0, out.err
        want = gim.attribute(model, made, PROMPT, **same)
        found = gim.AnswerAttribution.from_json(tmp_path / "a.json")
        assert found.answer == want.answer and "What each token was made of" in out.out
        torch.testing.assert_close(found.scores, want.scores, rtol=1e-4, atol=1e-4)
    shown = run("show", str(tmp_path / "a.json"))
    assert shown.code == 0 and shown.out in out.out

    # Passages by what they say, as text and as a file.
    passage = tmp_path / "passage.txt"
    passage.write_text(" ate the\n")
    parts = ("--segment", "first=The cat sat", "--segment", f"second=@{passage}")
    out = run(*common, str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html"), "--answer", ANSWER, *parts)
    named = {"first": (0, 11), "second": (PROMPT.index(" ate the"), len(PROMPT))}
    by_part = gim.attribute(model, made, PROMPT, answer=ANSWER, segments=named)
    assert gim.AnswerAttribution.from_json(tmp_path / "p.json").prompt.segments == named
    wanted = by_part.to_table("sentence", "segment")
    page = (tmp_path / "p.html").read_text()
    for sentence, scores in zip(wanted.rows, wanted.scores.tolist(), strict=True):
        assert sentence.text in out.out and sentence.text in page
        assert all(f"{score:+.3g}" in out.out and f"{score:+.3g}" in page for score in scores if score)
    assert out.out.count("first") > 1 and "answer's earlier tokens" in out.out

    chat = [{"role": "user", "content": PROMPT}]
    assert run(*common, str(tmp_path / "c.json"), "--chat").code == 0
    found = gim.AnswerAttribution.from_json(tmp_path / "c.json")
    assert found.answer == gim.attribute(model, made, chat, generate=32).answer
    assert run(*common, str(tmp_path / "n.json"), "--chat", "--next").code == 0
    one = gim.Attribution.from_json(tmp_path / "n.json")
    assert one.target.token_ids == gim.attribute(model, made, chat).target.token_ids

    for arguments, message in (
        (("--answer", ANSWER, "--generate", "3"), "--answer and --generate cannot both be given"),
        (("--answer", ANSWER, "--target", " cat"), "--target and --answer cannot both be given"),
        (("--generate", "3", "--next"), "--generate and --next cannot both be given"),
        (("--answer", ""), "--answer must not be empty"),
        (("--generate", "0"), "generate must be at least 1 token, got 0"),
        (("--segment", "cat"), "--segment must be NAME=TEXT or NAME=@FILE, got 'cat'"),
        (("--segment", "a=dog"), "--segment a: what it says must occur in the prompt once, and does 0 times"),
        (("--segment", "a=the"), "--segment a: what it says must occur in the prompt once, and does 2 times"),
        (("--segment", "a=cat", "--segment", "a=mat"), "--segment a is given twice"),
        (("--segment", "a=@none.txt"), "--segment a: No such file"),
        (("--segment", "a=cat sat", "--segment", "b=sat on"), "segments['a'] and segments['b'] overlap"),
    ):
        refused = run(*common, str(tmp_path / "x.json"), *arguments)
        assert refused.code == 2 and message in refused.err, refused.err
