"""Masked language models, sequence classifiers and chats, as text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from typer.testing import CliRunner

import gim
from gim.cli import app
from gim.targets import Continuation, Contrast, Token
from tests.families import SHARED, text_model, tokenizer

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
)


@pytest.fixture
def words() -> Any:
    made = tokenizer()
    made.add_special_tokens({"mask_token": "<mask>"})
    made.chat_template = CHAT
    return made


def make(kind: str, words: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(**{**SHARED, "vocab_size": len(words)}, **settings)
    return getattr(hf, f"Bert{kind}")(config).eval()


def test_a_masked_language_model_is_explained_at_its_mask(words: Any) -> None:
    model = make("ForMaskedLM", words)
    prompt = "The cat sat on the <mask> and ate."
    found = gim.attribute(model, words, prompt)
    where = words(prompt)["input_ids"].index(words.mask_token_id)
    assert found.target.positions == (where,)
    assert 0 < where < len(found.tokens) - 1
    want = gim.explain(model, torch.tensor(found.token_ids), tokenizer=words, target_position=where)
    assert torch.equal(found.scores, want)
    assert found.target.token_ids == (int(model(torch.tensor([found.token_ids])).logits[0, where].argmax()),)
    other = gim.attribute(model, words, prompt, position=1)
    assert other.target.positions == (1,)
    for text in ("The cat sat.", "The <mask> sat on <mask>."):
        with pytest.raises(ValueError, match="prompt must hold one '<mask>' for a masked language model, got "):
            gim.attribute(model, words, text)
        assert gim.attribute(model, words, text, position=-1).target.positions == (len(words(text).input_ids) - 1,)
    without = copy.deepcopy(words)
    without.mask_token = None
    with pytest.raises(ValueError, match="position must be given: BertForMaskedLM fills in .* has no mask token"):
        gim.attribute(model, without, prompt)
    assert torch.equal(gim.attribute(model, without, prompt, position=1).scores, other.scores)
    with pytest.raises(ValueError, match="target must be one masked token at a position inside the prompt"):
        gim.attribute(model, words, prompt, target=Continuation(" the rat"))


def test_a_classifier_is_explained_by_class(words: Any) -> None:
    labels = {0: "bad", 1: "fair", 2: "good"}
    model = make("ForSequenceClassification", words, id2label=labels, label2id={v: k for k, v in labels.items()})
    prompt = "The cat sat on the mat."
    ids = torch.tensor(words(prompt)["input_ids"])
    for target in (2, "good", Token("good")):
        found = gim.attribute(model, words, prompt, target=target)
        assert (found.target.tokens, found.target.token_ids) == (("good",), (2,))
        assert torch.equal(found.scores, gim.explain(model, ids, tokenizer=words, target_token_id=2))
        assert found.target.value == pytest.approx(model(ids[None]).logits[0, 2].item(), rel=1e-5)
    predicted = gim.attribute(model, words, prompt)
    assert predicted.target.tokens == (labels[int(model(ids[None]).logits.argmax())],)
    contrast = gim.attribute(model, words, prompt, target=Contrast("good", "bad"))
    difference = gim.explain(model, ids, tokenizer=words, target_token_id=2) - gim.explain(
        model, ids, tokenizer=words, target_token_id=0
    )
    assert torch.allclose(contrast.scores, difference, atol=1e-5 * float(difference.abs().max()))
    with pytest.raises(ValueError, match=r"target must be one of the model's classes \['bad', 'fair', 'good'\]"):
        gim.attribute(model, words, prompt, target="ugly")
    with pytest.raises(ValueError, match=r"target must be a class in 0\.\.2, got 3"):
        gim.attribute(model, words, prompt, target=3)
    for several in ([1], Continuation("good")):
        with pytest.raises(ValueError, match="target must be a class by number or label, got "):
            gim.attribute(model, words, prompt, target=several)


class Pooled(nn.Module):
    """A classifier of one's own: nothing in its name says that it is one."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.score = encoder, nn.Linear(width, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()  # type: ignore[operator]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.score(hidden[:, 0])


def test_classes_of_a_classifier_of_ones_own_are_no_tokens(words: Any) -> None:
    encoder = make("Model", words)
    model = Pooled(encoder, encoder.config.hidden_size).eval()
    prompt = "The cat sat on the mat."
    ids = torch.tensor(words(prompt)["input_ids"])
    found = gim.attribute(model, words, prompt, target=4)
    assert (found.target.label, found.target.tokens, found.target.token_ids) == ("'4'", ("4",), (4,))
    assert {one.token for one in found.next_tokens} <= {"LABEL_0", "LABEL_1", "2", "3", "4"}
    assert torch.equal(found.scores, gim.explain(model, ids, tokenizer=words, target_token_id=4))


def test_a_number_for_each_token_is_no_class(words: Any) -> None:
    config = hf.ElectraConfig(
        vocab_size=len(words), hidden_size=16, embedding_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="ElectraForPreTraining gives 6 numbers for 6 tokens, and whether they are of"):
        gim.explain(hf.ElectraForPreTraining(config).eval(), torch.arange(6), baseline_token_id=1, target_token_id=0)


def test_an_encoder_decoder_is_refused_before_it_runs(words: Any) -> None:
    """It would answer by its decoder alone, whose first tokens were cut off as the prompt's."""
    config = hf.ProphetNetConfig(
        vocab_size=len(words), hidden_size=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_encoder_layers=1,
        num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.ProphetNetForConditionalGeneration(config).eval()
    pair = gim.circuits.Pair("The cat", "The mat", " sat", " ate")
    for ask in (
        lambda: gim.attribute(model, words, "The cat sat", generate=3),
        lambda: gim.evaluate(model, words, ["The cat sat on the mat"], methods=("GIM",)),
        lambda: gim.circuits.attribute(model, [pair], tokenizer=words),
    ):
        with pytest.raises(ValueError, match="ProphetNetForConditionalGeneration is an encoder-decoder, which embeds"):
            ask()


def test_a_chat_is_rendered_with_the_template_and_no_second_start(words: Any) -> None:
    model = text_model(torch.float32)
    model.resize_token_embeddings(len(words))
    messages = [{"role": "user", "content": "The cat sat."}]
    found = gim.attribute(model, words, messages)
    assert found.text == "<s>user: The cat sat.\nbot:"
    assert list(found.token_ids) == words.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]  # fmt: skip
    assert found.special == (True, *[False] * (len(found.tokens) - 1))
    assert all(span.text != "<s>" for span in found.to_words())
    assert any(span.text == "<s>" for span in found.to_words(skip_special=False))
    for bad in ([{"role": "user"}], 3):
        with pytest.raises(TypeError, match="prompt must be text, or messages with role and content"):
            gim.attribute(model, words, bad)
    with pytest.raises(
        ValueError, match="prompt must be text, messages with role and content, or a list of such, got an"
    ):
        gim.attribute(model, words, [])
    words.chat_template = None
    with pytest.raises(ValueError, match="prompt is a chat, and the tokenizer has no chat template"):
        gim.attribute(model, words, messages)


def test_the_command_line_knows_heads_and_chats(tmp_path: Path, words: Any) -> None:
    labels = {0: "bad", 1: "good"}
    classifier = make("ForSequenceClassification", words, id2label=labels, label2id={v: k for k, v in labels.items()})
    causal = text_model(torch.float32)
    causal.resize_token_embeddings(len(words))
    models = {"class": classifier, "mask": make("ForMaskedLM", words), "chat": causal}
    asked = {"class": ["--target", "good"], "mask": [], "chat": ["--chat", "--next"]}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
        out = tmp_path / f"{name}.json"
        ran = CliRunner().invoke(
            app,
            [
                "explain",
                "-m",
                str(tmp_path / name),
                "-p",
                "The cat sat on the <mask>.",
                "--json",
                str(out),
                *asked[name],
            ],
        )
        assert ran.exit_code == 0, ran.output
        fields = json.loads(out.read_text(encoding="utf-8"))
        found = gim.Attribution.from_json(out)
        assert fields["text"].startswith("<s>user:" if name == "chat" else "The cat")
        assert name != "class" or found.target.tokens == ("good",)
        assert CliRunner().invoke(app, ["check", str(tmp_path / name)]).exit_code == 0
