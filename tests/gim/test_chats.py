"""Chats as structure: where each message stands, and which tokens are the template's own."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import gim
from gim import prompts
from gim.attribution import Attribution
from gim.report.facts import answer_facts
from gim.report.text import number
from tests.families import text_model, tokenizer
from tests.oracle import LIBRARIES_RELATIVE

PROMPT = "The cat sat on the mat and ate the"

#: The layouts that chat models have, each in a few words: headers of one or several tokens, contents that are trimmed
#: or not, a system message in front, inside the first user's or nowhere, answers that are closed or not.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml with a system message of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headers": (
        "<s>{% for m in messages %}<|header|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}"
    ),
    "turns": (
        "<s>{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    ),
    "instructions": (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }}"
        " [/INST]{% endif %}{% endfor %}"
    ),
    "system inside the first": (
        "{% if messages[0].role == 'system' %}{% set lead = '<<SYS>>' + messages[0].content + '<</SYS>>\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}<s>"
        "{% for m in rest %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}[INST] "
        "{{ lead if loop.first }}{{ m.content | trim }} [/INST]"
        "{% endif %}{% endfor %}"
    ),
    "words": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "tags": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
    ),
    "thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') if m.role =="
        " 'assistant' else m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "parts": (
        "{% for m in messages %}<s>{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}<e>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    ),
    "tools": (
        "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>\n{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
}
CHAT = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "The cat sat? "},
    {"role": "assistant", "content": "On the mat"},
    {"role": "user", "content": "The cat sat? "},
)
NAMES = ["system", "user 1", "assistant", "user 2"]


def with_template(template: str) -> Any:
    made = tokenizer()
    made.chat_template = TEMPLATES.get(template, template)
    return made


def as_read(template: str, messages: Any) -> Any:
    """Messages in the form that the template reads, for transformers' own rendering."""
    if template != "parts":
        return messages
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_message_is_found_and_the_rest_is_the_templates(template: str) -> None:
    made = with_template(template)
    found = prompts.encode(list(CHAT), made)
    assert found.text == made.apply_chat_template(
        as_read(template, CHAT), tokenize=False, add_generation_prompt=True
    )  # fmt: skip
    assert list(found.segments) == NAMES
    for (name, (start, end)), message in zip(found.segments.items(), CHAT, strict=True):
        said = found.text[start:end]
        assert said in (message["content"], message["content"].strip()), name
    # A character of a message is in a token that is not the template's, and every other token has none.
    inside = [any(start <= at < end for start, end in found.segments.values()) for at in range(len(found.text))]
    for (start, end), own in zip(found.offsets, found.template, strict=True):
        assert own == (not any(inside[start:end]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prefilled_answer_is_found_as_well(template: str) -> None:
    made = with_template(template)
    found = prompts.encode(list(CHAT[:3]), made)
    theirs = made.apply_chat_template(as_read(template, CHAT[:3]), tokenize=False, continue_final_message=True)
    assert found.text == theirs
    assert list(found.segments) == ["system", "user", "assistant"]
    start, end = found.segments["assistant"]
    assert (found.text[start:end], end) == ("On the mat", len(found.text))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }} {{ m.content }}{% endfor %}",  # said twice
        "{% for m in messages %}{{ m.content | replace('S', 's') }}{% endfor %}",
        "{{ messages[0].content | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% if '1' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_where_a_template_changes_messages_nothing_is_said_of_it(template: str) -> None:
    found = prompts.encode([CHAT[1]], with_template(template))
    assert found.segments == {} and not any(found.template)


@pytest.mark.parametrize("dumped", ["m.content", "m.content | tojson"])
def test_a_template_that_prints_parts_as_a_list_reads_none(dumped: str) -> None:
    """Where it changes a user's text, the list is no way to have that said."""
    template = (
        f"{{% for m in messages %}}[{{% if m.content is string %}}{{{{ m.content.split('</t>')[-1] }}}}"
        f"{{% else %}}{{{{ {dumped} }}}}{{% endif %}}]{{% endfor %}}"
    )
    made = with_template(template)
    assert prompts.encode([{"role": "user", "content": "The cat"}], made).text == "[The cat]"
    with pytest.raises(ValueError, match="chat template leaves out what a user says"):
        prompts.encode([{"role": "user", "content": "so </t> The cat"}], made)


def test_what_a_template_leaves_out_of_other_messages_is_warned_of() -> None:
    users = with_template("{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}")
    with pytest.warns(UserWarning, match="leaves out, or changes, what messages say: system, assistant$"):
        assert prompts.encode(list(CHAT), users).text == "[The cat sat? ][The cat sat? ]"
    thoughts = [*CHAT[:2], {"role": "assistant", "content": "<think>cat</think>On the mat"}, CHAT[3]]
    with pytest.warns(UserWarning, match="leaves out, or changes, what messages say: assistant$"):
        prompts.encode(thoughts, with_template("thoughts"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts.encode(list(CHAT), with_template("thoughts"))
        with pytest.raises(ValueError, match="message 3, the last, cannot be continued"):
            prompts.encode(thoughts[:3], with_template("thoughts"))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for"])
def test_a_template_that_fails_in_whatever_way_refuses_the_chat(template: str) -> None:
    with pytest.raises(ValueError, match="prompt is a chat that the tokenizer's chat template refuses"):
        prompts.encode([CHAT[1]], with_template(template))


def test_what_is_no_chat_or_no_text_is_refused() -> None:
    for role in (None, 3, ["user"]):
        with pytest.raises(TypeError, match="prompt must be text, or messages with role and content"):
            prompts.encode([{"role": role, "content": "The cat"}], with_template("chatml"))
    for prompt in ("cat \ud83d", [{"role": "user", "content": "cat \ud83d"}]):
        with pytest.raises(
            ValueError, match=r"prompt must be text, and '\\ud83d' at character \d+ of it is no character"
        ):
            prompts.encode(prompt, with_template("chatml"))


def test_messages_without_text_and_several_parts() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{}]}
    two = {"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]}
    found = prompts.encode([two, call, {"role": "tool", "content": "GIM_SAYS1."}], with_template("chatml"))
    assert {name: found.text[slice(*ends)] for name, ends in found.segments.items()} == {
        "user": "The cat", "tool": "GIM_SAYS1.",
    }  # fmt: skip


def test_arguments_of_the_template_pass_through() -> None:
    thoughts, tools = with_template("thoughts"), with_template("tools")
    messages = [CHAT[1]]
    for made, arguments in ((thoughts, {"enable_thinking": False}), (tools, {"tools": [{"name": "f"}]})):
        found = prompts.encode(messages, made, arguments).text
        assert found == made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        assert found != prompts.encode(messages, made).text
    names: tuple[Any, ...] = (
        "tokenize", "add_generation_prompt", "padding", "truncation", "max_length", "chat_template", "return_tensors",
        "tokenizer_kwargs", "conversation", "messages", 3,
    )  # fmt: skip
    for wrong in names:
        with pytest.raises(ValueError, match=r"template_arguments must be named arguments .* got"):
            prompts.encode(messages, tools, {wrong: True})
    with pytest.raises(TypeError, match="template_arguments must be a mapping"):
        prompts.encode(messages, tools, [1])
    with pytest.raises(ValueError, match="template_arguments are for a chat, and prompt is text"):
        prompts.encode("The cat", tools, {"tools": []})


def test_arguments_that_the_template_does_not_read_are_warned_of() -> None:
    messages = [CHAT[1]]
    thoughts, tools = with_template("thoughts"), with_template("tools")
    for made, arguments, message in (
        (thoughts, {"enable_thinkin": False}, "does not read 'enable_thinkin'; what it reads is enable_thinking$"),
        (thoughts, {"tools": [], "enable_thinking": True}, "does not read 'tools'; what it reads is enable_thinking$"),
        (tools, {"documents": [{"title": "a", "text": "b"}]}, "does not read 'documents'; what it reads is tools$"),
        (with_template("words"), {"a": 1, "b": 2}, "does not read 'a', 'b'; what it reads is the messages alone$"),
    ):
        with pytest.warns(UserWarning, match=message):
            prompts.encode(messages, made, arguments)
    # Whatever way it is read in, in tags of transformers' own too.
    for read in (
        "{% if style is defined %}{{ style }}{% endif %}",
        "{% set style = style | default('b') %}{{ style }}",
        "{% if style is not defined %}{% set style = 'b' %}{% endif %}{{ style }}",
        "{% macro f() %}{{ style }}{% endmacro %}{{ f() }}",
        "{% for m in messages %}{% generation %}{{ style }}{% endgeneration %}{% break %}{% endfor %}",
    ):
        made = with_template(f"{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}{read}")
        assert prompts.encode(messages, made, {"style": "a"}).text.endswith("a"), read
        with pytest.warns(UserWarning, match="does not read 'stile'"):
            prompts.encode(messages, made, {"stile": "a"})


def test_arguments_of_named_templates_and_of_tokenizers_with_code_of_their_own() -> None:
    messages = [CHAT[1]]
    several = tokenizer()
    several.chat_template = {"default": TEMPLATES["thoughts"], "tool_use": TEMPLATES["tools"]}
    assert "<tools>" in prompts.encode(messages, several, {"tools": [{"name": "f"}]}).text
    assert "<think>" in prompts.encode(messages, several, {"enable_thinking": False}).text
    with pytest.warns(UserWarning, match="does not read 'enable_thinking'; what it reads is tools"):
        prompts.encode(messages, several, {"tools": [{"name": "f"}], "enable_thinking": False})

    class Own(type(several)):
        def apply_chat_template(self, conversation: Any, mood: str = "", **_: Any) -> str:
            return mood + "".join(one["content"] for one in conversation)

    several.__class__ = Own
    assert prompts.encode(messages, several, {"mood": "glad: "}).text.startswith("glad: The cat")
    with pytest.raises(ValueError, match=r"template_arguments must be named arguments .* got 'padding'"):
        prompts.encode(messages, several, {"padding": True})


# ---- in an attribution


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model(torch.float64)


@pytest.fixture(scope="module")
def attributed(model: Any) -> Attribution:
    return gim.attribute(model, with_template("words"), list(CHAT))


def test_scores_are_those_of_the_ids_and_ranks_leave_the_template_out(model: Any, attributed: Attribution) -> None:
    made = with_template("words")
    whole = gim.explain(model, torch.tensor(attributed.token_ids), tokenizer=made)
    torch.testing.assert_close(attributed.scores, whole.float(), rtol=0, atol=0)
    assert any(attributed.template) and attributed.aside == tuple(
        map(any, zip(attributed.special, attributed.template, strict=True))
    )
    ranked = {token.position for token in attributed.top(1000)}
    assert ranked == {position for position, aside in enumerate(attributed.aside) if not aside}
    everything = attributed.top(1000, skip_special=False)
    assert len(everything) == len(attributed)
    for name, span in zip(attributed.segments, attributed.to_segments(), strict=True):
        start, end = attributed.segments[name]
        assert (span.name, span.text) == (name, attributed.text[start:end])
    # The template's characters are in no word, sentence or sum.
    total = sum(s for s, aside in zip(attributed.scores.tolist(), attributed.aside, strict=True) if not aside)
    for spans in (attributed.to_words(), attributed.to_sentences()):
        assert sum(span.score for span in spans) == pytest.approx(total, abs=1e-6)
        assert not any("Assistant" in span.text for span in spans)


def test_the_likeliest_tokens_are_the_models(model: Any) -> None:
    made = tokenizer()
    found = gim.attribute(model, made, PROMPT, target=" cat")
    with torch.no_grad():
        logits = model(torch.tensor([found.token_ids])).logits[0, -1].double()
    want = torch.softmax(logits, -1).sort(descending=True, stable=True)
    assert [one.token_id for one in found.next_tokens] == want.indices[:5].tolist()
    assert [one.token for one in found.next_tokens] == [made.decode([i]) or f"⟨{i}⟩" for i in want.indices[:5]]
    assert [one.probability for one in found.next_tokens] == pytest.approx(
        want.values[:5].tolist(), rel=LIBRARIES_RELATIVE
    )


def test_a_measure_takes_the_place_of_the_targets(model: Any) -> None:
    made = tokenizer()
    found = gim.attribute(model, made, PROMPT, target=" cat", measure="logprob")
    assert found == gim.attribute(model, made, PROMPT, target=gim.targets.Token(" cat", measure="logprob"))
    with pytest.raises(ValueError, match="measure must be one of"):
        gim.attribute(model, made, PROMPT, measure="loss")  # type: ignore[call-overload]


def test_parts_of_a_text_by_name(model: Any) -> None:
    made = tokenizer()
    found = gim.attribute(model, made, PROMPT, segments={"rest": (4, len(PROMPT)), "first": [0, 4]})
    assert found.segments == {"first": (0, 4), "rest": (4, len(PROMPT))}
    assert found.to_segments() == found.spans({"first": (0, 4), "rest": (4, len(PROMPT))})
    for wrong, error, message in (
        ({"a": (0, 5), "b": (4, 6)}, ValueError, r"segments\['a'\] and segments\['b'\] overlap"),
        ({"a": (3, 3)}, ValueError, r"segments\['a'\] must satisfy 0 <= start < end <="),
        ({"a": (0, 10_000)}, ValueError, r"segments\['a'\] must satisfy"),
        ({"a": 3}, TypeError, r"segments must be a mapping of names to \(start, end\), got 'a': 3"),
        ({1: (0, 1)}, TypeError, "segments must be a mapping of names"),
        ([(0, 1)], TypeError, "segments must be a mapping of names"),
    ):
        with pytest.raises(error, match=message):
            gim.attribute(model, made, PROMPT, segments=wrong)


def test_all_of_it_is_written_and_read_and_older_files_are_read(attributed: Attribution) -> None:
    fields = json.loads(attributed.to_json())
    assert fields == attributed.to_dict()
    assert Attribution.from_json(attributed.to_json()) == attributed
    for name in ("template", "segments", "next_tokens"):
        del fields[name]
    older = Attribution.from_json(json.dumps(fields))
    assert older == replace(attributed, template=(), segments={}, next_tokens=())
    wrong = {**attributed.to_dict(), "template": [True]}
    with pytest.raises(ValueError, match="template must have one entry for each"):
        Attribution.from_json(json.dumps(wrong))
    with pytest.raises(ValueError, match=r"field 'next_tokens' entry 0 must have the fields"):
        Attribution.from_json(json.dumps({**attributed.to_dict(), "next_tokens": [{}]}))


def test_a_data_frame_has_a_row_for_each_token(attributed: Attribution) -> None:
    frame = attributed.to_dataframe()
    assert list(frame.columns) == [
        "position", "token", "token_id", "start", "end", "score", "special", "template", "segment",
    ]  # fmt: skip
    assert frame["score"].tolist() == attributed.scores.tolist()
    assert list(zip(frame["start"], frame["end"], strict=True)) == list(attributed.offsets)
    said = frame[frame["segment"] == "assistant"]
    assert "".join(said["token"]).strip() == "On the mat"
    assert (frame["segment"] == "").tolist() == [bool(one) for one in attributed.aside]


def test_every_view_says_what_is_set_aside(attributed: Attribution) -> None:
    first = replace(attributed, special=(True, *attributed.special[1:]))
    rest = [p for p, aside in enumerate(first.aside) if aside and not first.special[p]]
    total = number(sum(first.scores[p].item() for p in rest))
    line = (
        f"the first token {first.tokens[0]!r} (attention sink) {number(first.scores[0].item())}, "
        f"{len(rest)} tokens of the chat template {total}"
    )
    assert dict(answer_facts(first))["Set aside"] == line
