"""explain() and attribute(): targets, positions, text."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import gim
from gim import circuits, prompts
from gim.targets import Continuation, Contrast, Token
from gim_kernels.budget import largest_error
from tests import eager
from tests.families import ids, make, text_model, tokenizer
from tests.first import first
from tests.head import heads_run
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

PROMPT = "The cat sat on the mat"


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model()


@pytest.fixture(scope="module")
def tok() -> Any:
    return tokenizer()


def by_hand(model: Any, tokens: list[int], terms: list[tuple[int, int, float]], baseline: int, logprob: bool) -> Any:
    """Attributions to a sum of (position, token, sign) terms, and the sum, by the eager implementation."""
    table = model.get_input_embeddings().weight.detach()
    embedded = table[torch.tensor([tokens])].requires_grad_(True)
    logits = eager.forward(model, embedded, eager.PRESETS["GIM"])[0]
    if logprob:
        logits = logits - logits.exp().sum(-1, keepdim=True).log()
    value = sum(sign * logits[position, token] for position, token, sign in terms)
    (grad,) = torch.autograd.grad(value, embedded)
    return ((embedded.detach() - table[baseline]) * grad).sum(-1)[0], float(value.detach())


def test_explain_has_gim_explains_names_and_defaults() -> None:
    parameters = inspect.signature(gim.explain).parameters
    want = {
        "target_token_id": None, "target_position": -1, "baseline_token_id": None, "tokenizer": None,
        "freeze_norm": True, "softmax_temperature": 2.0, "q_scale": 0.25, "k_scale": 0.25, "v_scale": 0.5,
        "gate_scale": 0.5, "up_scale": 0.5,
    }  # fmt: skip
    assert {name: parameters[name].default for name in want} == want
    context = inspect.signature(gim.GIM).parameters
    assert {name: context[name].default for name in list(want)[4:]} == dict(list(want.items())[4:])


def test_where_torch_makes_tensors_by_default_is_nothing_to_a_model(model: Any, tok: Any, tmp_path: Path) -> None:
    texts = [PROMPT, "The rat ate"]
    pair = circuits.Pair("The cat sat", "The rat sat", " on", " and")
    given = tok(PROMPT, return_tensors="pt").input_ids

    def everything(name: str) -> list[torch.Tensor]:
        listed = gim.attribute(model, tok, texts)
        answer = gim.attribute(model, tok, PROMPT, answer=" and")
        answer.to_json(tmp_path / name)
        read = gim.AnswerAttribution.from_json(tmp_path / name)
        tiled = gim.explain(model, given, tokenizer=tok, memory="mlp+tile=3")
        edges = circuits.attribute(model, [pair], tokenizer=tok).scores
        return [*(one.scores for one in listed), read.scores, tiled, edges]

    want = everything("before.json")
    with torch.device("meta"):  # for a GPU, which the model is not on either
        found = everything("inside.json")
    assert all(map(torch.equal, want, found))


@pytest.mark.parametrize("position", [-1, -5, 0, 12, 36])
def test_target_position(position: int) -> None:
    model, tokens = make("llama"), ids()
    got = gim.explain(model, tokens, baseline_token_id=3, target_position=position, target_token_id=7)
    for row in range(2):
        want, _ = by_hand(model, tokens[row].tolist(), [(position, 7, 1.0)], 3, False)
        assert_close64(got[row], want, f"row {row}", relative=FLOAT64_MODEL_RELATIVE)


def test_negative_positions_count_from_the_last_token_that_is_not_padding() -> None:
    model, tokens = make("qwen3"), ids()
    mask = torch.ones_like(tokens)
    mask[0, -9:] = 0
    mask[1, :4] = 0
    got = gim.explain(model, tokens, baseline_token_id=3, target_position=-3, target_token_id=7, attention_mask=mask)
    for row, part in ((0, slice(0, -9)), (1, slice(4, None))):
        want = gim.explain(model, tokens[row, part], baseline_token_id=3, target_position=-3, target_token_id=7)
        assert_close64(got[row, part], want, f"row {row}", relative=FLOAT64_MODEL_RELATIVE)
    column = gim.explain(model, tokens, baseline_token_id=3, target_position=25, target_token_id=7, attention_mask=mask)
    want = gim.explain(model, tokens[1, 4:], baseline_token_id=3, target_position=21, target_token_id=7)
    assert_close64(column[1, 4:], want, "column", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("padding", first(("left", "right", "none"), ("left",)))
def test_one_target_for_each_row_is_each_row_alone(padding: str) -> None:
    model, tokens = make("llama"), ids(3)
    mask = torch.ones_like(tokens)
    if padding != "none":
        mask[1, :9] = 0
        mask[2, :20] = 0
        mask = mask if padding == "left" else mask.flip(-1)
    targets = [7, 50, 7]
    # Ids of another integer type, and one tensor without dimensions, are the same ids.
    for given in (targets, tuple(targets), torch.tensor(targets), torch.tensor(targets, dtype=torch.int32)):
        got = gim.explain(model, tokens, baseline_token_id=3, target_token_id=given, attention_mask=mask)
        for row, target in enumerate(targets):
            kept = mask[row].bool()
            want, _ = by_hand(model, tokens[row, kept].tolist(), [(-1, target, 1.0)], 3, False)
            assert_close64(got[row, kept], want, f"row {row}", relative=FLOAT64_MODEL_RELATIVE)
    one = gim.explain(model, tokens[0], baseline_token_id=3, target_token_id=torch.tensor(7))
    assert torch.equal(one, gim.explain(model, tokens[0], baseline_token_id=3, target_token_id=7))
    assert torch.equal(one, gim.explain(model, tokens[0], baseline_token_id=3, target_token_id=[7]))


def test_shapes_follow_gim_explain() -> None:
    model = make("llama", torch.float32)
    assert gim.explain(model, ids(1)[0], baseline_token_id=3).shape == (37,)
    assert gim.explain(model, ids(1), baseline_token_id=3).shape == (37,)
    assert gim.explain(model, ids(3), baseline_token_id=3).shape == (3, 37)
    half = gim.explain(make("llama", torch.bfloat16), ids(1), baseline_token_id=3)
    assert half.dtype == torch.float32
    assert gim.explain(model, ids(1).int(), baseline_token_id=3).dtype == torch.float32


def test_only_the_explained_positions_go_through_the_head(model: Any, tok: Any) -> None:
    widths: list[int] = []
    with heads_run(model, widths):
        gim.attribute(model, tok, PROMPT)
        gim.attribute(model, tok, PROMPT, target=Contrast(5, 6))
        gim.attribute(model, tok, PROMPT, target=Continuation([5, 6, 7]))
    assert widths == [1, 1, 3]


@pytest.mark.parametrize("measure", ["logit", "logprob"])
@pytest.mark.parametrize("kind", ["prediction", "token", "contrast", "continuation", "one"])
def test_every_target_is_its_definition_in_one_backward(model: Any, tok: Any, kind: str, measure: Any) -> None:
    tokens = tok(PROMPT).input_ids
    last = len(tokens) - 1
    prediction = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
    cases: dict[str, Any] = {
        "prediction": (Token(None, measure), [(last, prediction, 1.0)]),
        "token": (Token(" cat", measure), [(last, tok.encode(" cat", add_special_tokens=False)[0], 1.0)]),
        "contrast": (Contrast(17, " the", measure), [(last, 17, 1.0),
                     (last, tok.encode(" the", add_special_tokens=False)[0], -1.0)]),
        "continuation": (Continuation([40, 41, 42], measure),
                         [(last, 40, 1.0), (last + 1, 41, 1.0), (last + 2, 42, 1.0)]),
        "one": (Continuation([40], measure), [(last, 40, 1.0)]),
    }  # fmt: skip
    target, terms = cases[kind]
    inputs = tokens + [token for _, token, _ in terms[:-1]] if isinstance(target, Continuation) else tokens
    want, value = by_hand(model, inputs, terms, 5, measure == "logprob")
    result = gim.attribute(model, tok, PROMPT, target=target, baseline=5)
    assert result.scores.dtype == torch.float32 and result.scores.shape == (len(inputs),)
    assert largest_error(result.scores, want) < torch.finfo(torch.float32).eps
    assert result.target.value == pytest.approx(value, rel=1e-9)
    assert result.target.token_ids == tuple(token for _, token, _ in terms)
    assert result.target.positions == tuple(position for position, _, _ in terms)
    assert result.target.kind == ("continuation" if kind == "one" else kind)
    assert len(result.tokens) == len(inputs) and result.token_ids == tuple(inputs)


def test_what_a_plain_target_argument_means(model: Any, tok: Any) -> None:
    one = gim.attribute(model, tok, PROMPT, target=" cat").target
    assert (one.kind, one.tokens, one.measure) == ("token", (" cat",), "logit")
    several = gim.attribute(model, tok, PROMPT, target=" cat sat").target
    assert several.kind == "continuation" and "".join(several.tokens) == " cat sat" and several.measure == "logprob"
    for seven in (7, torch.tensor(7), torch.arange(9).numpy()[7]):
        assert gim.attribute(model, tok, PROMPT, target=seven).target.token_ids == (7,)
    assert gim.attribute(model, tok, PROMPT, target=[7, 8]).target.token_ids == (7, 8)
    assert gim.attribute(model, tok, PROMPT).target.kind == "prediction"


def test_whole_numbers_may_be_numpys(model: Any, tok: Any) -> None:
    given = tok(PROMPT, return_tensors="pt").input_ids
    want = gim.explain(model, given, target_token_id=7, target_position=2, baseline_token_id=3)
    arrays: list[Any] = [np.array([7, 2, 3]), torch.tensor([7, 2, 3])]
    for numbers in arrays:
        seven, two, three = numbers
        for target in (seven, numbers[:1]):
            found = gim.explain(model, given, target_token_id=target, target_position=two, baseline_token_id=three)
            assert torch.equal(found, want)
        result = gim.attribute(model, tok, PROMPT)
        compared = result.compare(result)
        assert result.top(two) == result.top(2) and compared.changes(two) == compared.changes(2)
        layers = gim.attribute(model, tok, PROMPT, per="layer")
        assert layers.top(two) == layers.top(2)
    wrongs: list[Any] = ["gpt2", 3]
    for wrong in wrongs:
        with pytest.raises(TypeError, match=f"tokenizer must be one of transformers, got {wrong!r}: load it with"):
            gim.explain(model, given, tokenizer=wrong)


def test_a_word_that_the_tokenizer_does_not_know_is_a_word_of_the_prompt(model: Any) -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "the": 2, "sat": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="[END]")
    result = gim.attribute(model, made, "the zebra [UNK] sat [END]")
    assert result.tokens == ("the", "[UNK]", "[UNK]", "sat", "[END]")
    assert result.special == (False, False, True, False, True)
    assert [word.text for word in result.to_words()] == ["the", "zebra", "sat"]
    answer = gim.attribute(model, made, "the", answer="zebra [UNK]")
    assert answer.special == (False, True)


def test_a_result_knows_its_text(model: Any, tok: Any) -> None:
    text = "The  cat\nsat: éß 漢 🙂"
    result = gim.attribute(model, tok, text, target=" cat sat on")
    assert result.text == text + " cat sat"
    assert result.special[0] and not any(result.special[1:])
    assert result.tokens[0] == "<s>"
    covered = set()
    for token, (start, end), special in zip(result.tokens, result.offsets, result.special, strict=True):
        if not special:
            assert result.text[start:end] == token
            covered |= set(range(start, end))
    assert covered == set(range(len(result.text)))
    assert result.engine == "blockwise" and result.report.complete
    assert result.rules == gim.rules.GIM and result.model.startswith("LlamaForCausalLM")
    assert result.baseline == (tok.encode(" ", add_special_tokens=False)[0], " ")
    by_ids = gim.attribute(model, tok, text, target=tok.encode(" cat sat on", add_special_tokens=False))
    assert by_ids.text == result.text and by_ids.offsets == result.offsets
    assert torch.equal(by_ids.scores, result.scores)


def test_attribute_agrees_with_explain(model: Any, tok: Any) -> None:
    tokens = tok(PROMPT, return_tensors="pt").input_ids
    got = gim.attribute(model, tok, PROMPT, rules="GIM_CONSTANT")
    want = gim.explain(model, tokens, tokenizer=tok, rules=gim.rules.GIM_CONSTANT)
    assert torch.equal(got.scores, want.float())


def test_progress_hears_every_layer_once(model: Any, tok: Any) -> None:
    for memory in ("none", "layer"):
        heard: list[tuple[str, int, int]] = []
        gim.attribute(model, tok, PROMPT, memory=memory, progress=lambda *event, to=heard: to.append(event))
        forward = [("forward", done, 3) for done in range(4)]
        assert heard == forward + [("backward", done, 3) for done in (1, 2, 3)], memory


def test_baselines_are_inferred_as_in_gim_explain() -> None:
    class Fake:
        pad_token_id, unk_token_id = 5, 6

        def __init__(self, space: list[int]) -> None:
            self.space = space

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert text == " " and not add_special_tokens
            return self.space

    from gim.inputs import infer_baseline

    assert infer_baseline(Fake([9, 8])) == 9
    fake = Fake([])
    assert infer_baseline(fake) == 5
    fake.pad_token_id = None  # type: ignore[assignment]
    assert infer_baseline(fake) == 6
    fake.unk_token_id = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="baseline could not be inferred"):
        infer_baseline(fake)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "prompt must not be empty"),
        ({"prompt": 3}, TypeError, "prompt must be text, or messages with role and content, got 3"),
        ({"target": " cat sat", "baseline": "cat sat"}, ValueError, "baseline must be one token, but 'cat sat' is"),
        ({"target": Token(" cat sat")}, ValueError, "target must be one token, but ' cat sat' is 2: "),
        ({"target": 320}, ValueError, "target must be a token id in 0..319, got 320"),
        ({"target": -1}, ValueError, "target must be a token id in 0..319, got -1"),
        ({"target": Contrast(1, 400)}, ValueError, "against must be a token id in 0..319, got 400"),
        ({"target": Contrast(1, "cat sat")}, ValueError, "against must be one token, but 'cat sat' is"),
        (
            {"target": Contrast(" cat sat", " cat ate")},
            ValueError,
            r"target must be one token, but ' cat sat' is 2: "
            r"\[' cat', ' sat'\]; against must be one token, but ' cat ate' is 2: .* first differ, ' sat' and ' ate', "
            "with ' cat' at the end of the prompt, or explain each text by itself",
        ),
        ({"target": Contrast(None, " cat sat")}, ValueError, "give the first of them, ' cat', or explain each text"),
        ({"target": Contrast(5, None)}, TypeError, "against must be a token id or text, got None"),
        ({"target": Contrast([5, 6], 7)}, TypeError, r"target must be a token id, or text .* got \[5, 6\]"),
        ({"target": torch.tensor([[5]])}, ValueError, r"one id or a list of ids, got a tensor of shape \(1, 1\)"),
        ({"target": torch.tensor([1.5])}, TypeError, r"target must be text or a list of token ids, got tensor\(1.5"),
        ({"target": [1.5, 2]}, TypeError, "target must be text or a list of token ids, got 1.5 among them"),
        ({"target": [" cat"]}, TypeError, "target must be text or a list of token ids, got ' cat' among them"),
        ({"target": " cat sat", "position": 1}, ValueError, r"got ' cat sat', which is 2 tokens: \[' cat', ' sat'\]"),
        ({"target": [1, 400]}, ValueError, "target must be a token id in 0..319, got 400"),
        ({"target": []}, ValueError, r"target must have at least one token, got \[\]"),
        ({"target": ""}, ValueError, "target must have at least one token, got ''"),
        (
            {"target": torch.tensor([], dtype=torch.int64)},
            ValueError,
            "target must have at least one token, got tensor",
        ),
        ({"target": 1.5}, TypeError, "target must be a token id, text, ids or a Target, got float"),
        ({"target": True}, TypeError, "target must be a token id, text, ids or a Target, got True"),
        ({"baseline": 320}, ValueError, "baseline must be a token id in 0..319, got 320"),
        ({"rules": "LRP"}, ValueError, "rules must be Rules or one of"),
    ],
)
def test_attribute_refuses(model: Any, tok: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        gim.attribute(model, tok, **{"prompt": PROMPT, **arguments})


def test_a_slow_tokenizer_is_refused(model: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="tokenizer must be a fast one.*got Slow"):
        gim.attribute(model, Slow(), PROMPT)


def test_targets_refuse_unknown_measures() -> None:
    for make_target in (lambda m: Token(3, m), lambda m: Contrast(3, 4, m), lambda m: Continuation([3], m)):
        with pytest.raises(ValueError, match="measure must be one of"):
            make_target("probability")


# --------------------------------------------------- special tokens, chats


def around(prefix: str, suffix: str) -> Any:
    """A tokenizer that puts special tokens around a text, by the template given."""
    made = tokenizer()
    made.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"})
    specials = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "<cls>", "<sep>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{prefix} $A {suffix}".strip(), special_tokens=specials
    )
    return made


@pytest.mark.parametrize(
    ("prefix", "suffix", "prompt", "expected"),
    [
        ("<s>", "", "The cat", "<s>The cat"),
        ("<s>", "", "<s>The cat", "<s>The cat"),
        ("<s>", "", "<s>", "<s>"),
        ("<s>", "", "<s><s>The", "<s><s>The"),  # two that the user wrote are two
        ("<s>", "", "The <s>cat", "<s>The <s>cat"),
        ("", "", "<s>The cat", "<s>The cat"),
        ("", "", "The cat", "The cat"),
        ("<cls>", "<sep>", "The <mask>", "<cls>The <mask><sep>"),
        ("<cls>", "<sep>", "<cls>The <mask><sep>", "<cls>The <mask><sep>"),
        ("<cls>", "<sep>", "<cls>The <mask>", "<cls>The <mask><sep>"),
        ("<cls>", "<sep>", "The <mask><sep>", "<cls>The <mask><sep>"),
        ("<cls>", "<sep>", "<cls>", "<cls><sep>"),
        ("<cls>", "<sep>", "<s>The <mask>", "<cls><s>The <mask><sep>"),
    ],
)
def test_a_text_with_its_special_tokens_gets_no_second_ones(
    prefix: str, suffix: str, prompt: str, expected: str
) -> None:
    made = around(prefix, suffix)
    found = prompts.encode(prompt, made)
    assert found.ids == made(expected, add_special_tokens=False).input_ids
    for token, (start, end) in zip(found.ids, found.offsets, strict=True):
        assert start == end or made.decode([token]) == prompt[start:end]
    model = text_model(torch.float32)
    model.resize_token_embeddings(len(made))
    result = gim.attribute(model, made, prompt)
    assert list(result.token_ids) == found.ids
    want = gim.explain(model, torch.tensor(found.ids), tokenizer=made)
    assert torch.equal(result.scores, want)


#: As Llama, Gemma and a model that reads lists of parts alone write chats.
PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content + '<e>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TRIMS = (
    "<s>{% for m in messages %}[{{ m.role }}]\n{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for c in m.content %}{{ c.text | trim }}+{% endfor %}{% endif %}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<s>{{ m.role }}: {% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}<e>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
USER = {"role": "user", "content": "The cat?"}


def chat(template: str, *messages: dict[str, Any]) -> str:
    made = tokenizer()
    made.chat_template = template
    before = copy.deepcopy(messages)
    found = prompts.encode(list(messages), made)
    assert messages == before
    # The offsets are those of the text that the model sees.
    assert found.ids == made(found.text, add_special_tokens=False).input_ids
    assert found.ids == made(found.text).input_ids[1:]
    return found.text


@pytest.mark.parametrize(
    ("template", "text", "ends"),
    [
        (PLAIN, "It sat", "<s>assistant: It sat"),
        (PLAIN, "", "<s>assistant: "),
        (PLAIN, "It ", "<s>assistant: It "),
        (PLAIN, " It", "<s>assistant:  It"),
        (TRIMS, "It sat", "[assistant]\nIt sat"),
        (TRIMS, "", "[assistant]\n"),
        (TRIMS, "It ", "[assistant]\nIt "),
        (TRIMS, "GIM_CONTINUES_HERE", "[assistant]\nGIM_CONTINUES_HERE"),
        (PARTS, "It", "<s>assistant: It"),
    ],
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_a_last_answer_is_continued_to_its_last_character(template: str, text: str, ends: str, as_parts: bool) -> None:
    content: Any = [{"type": "text", "text": text}] if as_parts else text
    found = chat(template, USER, {"role": "assistant", "content": content})
    opened = chat(template, USER)
    start = "<s>assistant: " if template is not TRIMS else "[assistant]\n"
    assert found.endswith(ends)
    assert found == opened.removesuffix(start) + ends
    closed = chat(template, USER, {"role": "assistant", "content": content}, USER)
    assert "<e>" in closed[len(opened.removesuffix(start)) :]


def test_an_answer_that_the_template_changes_cannot_be_continued() -> None:
    with pytest.raises(ValueError, match=r"message 2, the last, cannot be continued .* has '\\nIt' for ' It'"):
        chat(TRIMS, USER, {"role": "assistant", "content": " It"})
    with pytest.raises(ValueError, match="message 2, the last, cannot be continued .* leaves it out"):
        chat("{{ messages[0].content }}", USER, {"role": "assistant", "content": "It"})
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    for content in ({}, {"content": None}, {"content": "It"}):
        with pytest.raises(ValueError, match="message 2, the last, is a tool call of the model's"):
            chat(PLAIN, USER, {"role": "assistant", "tool_calls": calls, **content})


def test_roles_beside_the_users() -> None:
    system, call = {"role": "system", "content": "Sit."}, {"role": "assistant", "content": "", "tool_calls": [{}]}
    assert chat(PLAIN, system, USER) == "<s>system: Sit.<e>\n<s>user: The cat?<e>\n<s>assistant: "
    assert chat(PLAIN, USER, call, {"role": "tool", "content": "mat"}).endswith("<s>tool: mat<e>\n<s>assistant: ")
    assert chat("{% for m in messages %}{{ m.content or 'call' }}{% endfor %}", USER, {**call, "content": None}, USER)


def test_parts_of_text_are_read_as_the_template_reads_them() -> None:
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    for template, text in ((PLAIN, "The cat"), (TRIMS.replace("+", ""), "Thecat"), (PARTS, "The cat")):
        assert text in chat(template, {"role": "user", "content": parts})
        one = chat(template, {"role": "user", "content": parts[:1]})
        assert one == chat(template, {"role": "user", "content": "The "})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image", "url": "x"}], "part 2 of message 2 must be .* type 'image'"),
        ([{"type": "input_audio"}], "part 1 of message 2 must be .* got type 'input_audio'"),
        ([{"type": "text"}], r"part 1 of message 2 must be .* got \{'type': 'text'\}"),
        (["a"], "part 1 of message 2 must be .* got 'a'"),
        (3, "content of message 2 must be text or a list of parts, got 3"),
        (None, "content of message 2 must be text or a list of parts, got None"),
    ],
)
def test_content_that_is_no_text_is_named(content: Any, message: str) -> None:
    for template in (PLAIN, TRIMS, PARTS):
        with pytest.raises(ValueError, match=message):
            chat(template, {"role": "system", "content": "a"}, {"role": "user", "content": content})


def test_a_template_that_refuses_or_loses_messages_is_named() -> None:
    for template in ("{{ raise_exception('roles must alternate') }}", "{{ messages[0].content + 3 }}"):
        with pytest.raises(ValueError, match="prompt is a chat that the tokenizer's chat template refuses: "):
            chat(template, USER)
    with pytest.raises(ValueError, match="the tokenizer's chat template leaves out what a user says"):
        chat("{{ messages[0].content }}", USER, {"role": "user", "content": "And the mat?"})
