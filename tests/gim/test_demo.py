"""The demo model: its prompts are what they say, it answers them, and its records are its own."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gim import demo
from gim.demo import prompts, recall, train


@pytest.mark.parametrize("statements", [1, 2])
@pytest.mark.parametrize("facts", [1, 8, 32])
def test_statements_are_where_the_prompt_says(facts: int, statements: int) -> None:
    prompt = demo.make_prompt(0, facts=facts, statements=statements)
    assert len(prompt.statements) == statements
    assert prompt.facts == facts == len(set(re.findall(r"The password of \w+ is \w+\.", prompt.text)))
    assert prompt.text.endswith(f"\nQuestion: What is the password of {prompt.name}?\nAnswer:")
    for statement in prompt.statements:
        sentence = prompt.text[slice(*statement.sentence)]
        assert sentence == f"The password of {prompt.name} is{prompt.answer}."
        assert prompt.text[slice(*statement.word)] == prompt.answer.strip()


def test_same_seed_same_prompt_on_every_machine() -> None:
    # Pinned: the recall that is recorded beside the model is that of these very prompts.
    text = demo.make_prompt(0, facts=8, statements=2, tokens=2048, count_tokens=len).text
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "75418e4acd384f041ecfc9e663403fd7db4c6f83c976908a139674156861174f"
    )
    assert demo.make_prompt(1).text != demo.make_prompt(2).text


def test_held_out_prompts_contain_nothing_of_training() -> None:
    trained = {*prompts.filler("training")}
    assert not trained & {*prompts.filler("held_out")}
    for seed in range(20):
        prompt = demo.make_prompt(seed, tokens=4000, count_tokens=len)
        assert not any(passage in prompt.text for passage in trained)
        for name, word in re.findall(r"The password of (\w+) is (\w+)\.", prompt.text):
            assert prompts.pair_split(name, word) == "held_out"
    pairs = prompts.draw_pairs(random.Random(0), 32, "training")
    assert {prompts.pair_split(*pair) for pair in pairs} == {"training"}


def test_a_length_that_the_facts_do_not_fit_in_is_refused_with_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ with 8 facts, got 1$") as refused:
        demo.make_prompt(0, tokens=1, count_tokens=len)
    least = int(str(refused.value).split()[5])
    assert len(demo.make_prompt(0, tokens=least, count_tokens=len).text) == least
    with pytest.raises(ValueError, match=f"tokens must be at least {least} "):
        demo.make_prompt(0, tokens=least - 1, count_tokens=len)


def test_filler_mentions_no_name_and_no_word_of_a_fact() -> None:
    text = " ".join([*prompts.filler("training"), *prompts.filler("held_out")])
    assert {*prompts.NAMES, *prompts.WORDS}.isdisjoint(re.findall(r"\w+", text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facts": 0}, "1 to 32 facts, not 0"),
        ({"facts": 33}, "1 to 32 facts, not 33"),
        ({"statements": 3}, "once or twice, not 3 times"),
        ({"tokens": 100}, "needs count_tokens"),
        ({"tokens": 1000, "count_tokens": len, "passages": ()}, "no filler passage"),
    ],
)
def test_impossible_prompts_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.make_prompt(0, **arguments)


def test_demo_prompt_is_long_and_its_statements_are_far_apart() -> None:
    _, tokenizer = demo.load()
    prompt = demo.prompt()
    encoded = tokenizer(prompt.text, return_offsets_mapping=True)
    assert 2048 <= len(encoded.input_ids) < 2300
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == prompt.text
    first, second = (statement.word for statement in prompt.statements)
    assert second[0] - first[1] > len(prompt.text) / 4
    # A stated word is one token, so that a report shows it as one.
    for start, end in (first, second):
        assert (start - 1, end) in encoded.offset_mapping


def test_every_name_and_word_is_one_token() -> None:
    _, tokenizer = demo.load()
    for text in prompts.NAMES + prompts.WORDS:
        assert len(tokenizer(f" {text}", add_special_tokens=False).input_ids) == 1, text


def test_model_answers_the_demo_prompt_and_held_out_questions() -> None:
    model, tokenizer = demo.load()
    assert recall.answers(model, tokenizer, demo.prompt().text) == demo.prompt().answer
    report = recall.measure(model, tokenizer, cases=(recall.Case(256, 1, 12), recall.Case(256, 2, 12)), seed=7)
    for row in report["rows"]:
        assert row["right"] >= 11
        assert 256 <= row["shortest"] <= row["longest"] < 512


def test_model_needs_the_statements_and_either_one_is_enough() -> None:
    model, tokenizer = demo.load()

    def without(prompt: demo.Prompt, dropped: tuple[demo.Statement, ...]) -> str:
        text = prompt.text
        for statement in reversed(dropped):
            text = text[: statement.sentence[0]] + text[statement.sentence[1] + 1 :]
        return recall.answers(model, tokenizer, text)

    one_left = none_left = 0
    for seed in range(6):
        prompt = demo.prompt(seed, tokens=200)
        first, second = prompt.statements
        one_left += without(prompt, (first,)) == prompt.answer
        one_left += without(prompt, (second,)) == prompt.answer
        none_left += without(prompt, (first, second)) == prompt.answer
    assert one_left >= 11
    assert none_left <= 1


def test_model_is_small_and_loads_in_the_asked_dtype() -> None:
    assert (demo.model_folder() / "model.safetensors").stat().st_size < 8_000_000
    model, _ = demo.load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    assert not model.training


def test_records_hold_what_the_model_promises() -> None:
    folder = demo.model_folder()
    report = json.loads((folder / "recall.json").read_text(encoding="utf-8"))
    least = {512: 0.95, 1024: 0.90, 2048: 0.90}
    assert {(row["tokens"], row["statements"]) for row in report["rows"]} == {(t, s) for t in least for s in (1, 2)}
    for row in report["rows"]:
        assert row["recall"] == round(row["right"] / row["prompts"], 4) >= least[row["tokens"]]
        assert row["prompts"] >= (400 if row["tokens"] == 512 else 200)
        assert row["shortest"] >= row["tokens"]
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["minutes"] < 60
    # The card is written from the records: nobody edited a number in it.
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == train.model_card(folder, report, training)
    log = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["tokens"] == training["tokens"]


def test_importing_the_demo_loads_no_model_library() -> None:
    code = "import sys; import gim.demo.prompts as p; p.make_prompt(0); print(*sorted(sys.modules))"
    path = str(Path(demo.__file__).parents[2])
    script = f"import sys, types; gim = types.ModuleType('gim'); gim.__path__ = [{path!r} + '/gim']\n"
    script += f"sys.modules['gim'] = gim\n{code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "tokenizers"}.isdisjoint(result.stdout.split())


def test_training_without_the_licence_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="base-files"):
        train.read_licences(tmp_path / "missing")
    (tmp_path / "short").write_text("One paragraph of nothing much that is long enough to be kept.", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="holds 1 usable passages"):
        train.read_licences(tmp_path)


def test_training_texts_mark_their_answers_and_owners() -> None:
    _, tokenizer = demo.load()
    teacher = train.Teacher(tokenizer, prompts.filler("training"), random.Random(0))
    for lesson in train.CURRICULUM:
        text = teacher.text(lesson)
        if lesson.questions:
            assert len(text.before_answers) == lesson.questions
        else:
            assert lesson.facts[0] <= len(text.before_answers) <= lesson.facts[1]
        facts: dict[str, set[str]] = {}
        for place, owner in text.owners:
            token = tokenizer.decode(text.ids[place + (place in text.before_answers)])
            assert token.strip() in prompts.WORDS
            facts.setdefault(prompts.NAMES[owner], set()).add(token)
        assert all(len(words) == 1 for words in facts.values())
        assert len(facts) >= lesson.facts[0]


def test_training_is_repeatable() -> None:
    _, tokenizer = demo.load()

    def entries() -> list[dict[str, object]]:
        torch.manual_seed(0)
        model = train.build_model(tokenizer)
        teacher = train.Teacher(tokenizer, prompts.filler("training"), random.Random(0))
        lesson = train.Lesson("short", " {name} is {word}.", " {name} is", (2, 2), 2, (0, 0), 2, 4, 2.0)
        return [{**entry, "seconds": 0} for entry in train.train(model, teacher, [lesson])]

    first = entries()
    assert first == entries()
    assert [(entry["step"], entry["ends"]) for entry in first] == [(4, True)]
