"""Lists of prompts of several lengths: one after another in one row, where a model is proved to read each alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import gim
from gim import many
from gim.asked import Asked
from gim.parts import anatomy
from gim.parts.calling import Rows
from gim.single import Single
from gim.targets import MEASURES, Continuation, Contrast, Token
from tests.families import make, text_model, tokenizer
from tests.first import first
from tests.gim.test_many import PROMPTS, forwards

#: Longer than every window of :data:`tests.families.FAMILIES`, and different in length.
MIXED = [*PROMPTS, "The cat sat on the mat and the cat ate the rat and the mat sat on the cat."]
TARGETS = [None, Contrast(" cat", " mat"), Continuation(" on the mat"), Token(7, "logprob"), 9, 8, Continuation([5, 6])]


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
#: Digits of scores as results keep them, in float32; those of values are a model's own.
KEPT = 2e-7


class Small:
    """The tokenizer of these tests with ids of a smaller vocabulary."""

    is_fast, all_special_ids, mask_token_id = True, [0], None

    def __init__(self, size: int = 97) -> None:
        self._inner, self._size = tokenizer(), size

    def __call__(self, text: str, **named: Any) -> Any:
        encoded = self._inner(text, **named)
        encoded["input_ids"] = [one % self._size for one in encoded["input_ids"]]
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model()


def shapes(seen: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of forwards: the baseline's embedding is looked up too."""
    return [shape for shape in seen if shape != (1, 1)]


def assert_each_alone(model: Any, made: Any, prompts: list[str], relative: float, **options: Any) -> list[Any]:
    """The results of a list, which are what single calls give."""
    found = gim.attribute(model, made, prompts, **options)
    for place, (text, one) in enumerate(zip(prompts, found, strict=True)):
        each = {name: given[place] if isinstance(given, list) else given for name, given in options.items()}
        want = gim.attribute(model, made, text, **each)
        size = float(want.scores.abs().max())
        torch.testing.assert_close(one.scores, want.scores, rtol=0, atol=max(relative, KEPT) * size)
        assert one.target.value == pytest.approx(want.target.value, rel=relative, abs=relative)
        assert (one.text, one.tokens, one.target.token_ids) == (want.text, want.tokens, want.target.token_ids)
        assert [each.token for each in one.next_tokens] == [each.token for each in want.next_tokens]
        assert one.report.complete == want.report.complete
    return found


# Who may be packed


@pytest.mark.parametrize("family", first(("llama", "qwen2-window", "gemma3", "gpt2", "mixtral"), ("gemma3", "gpt2")))
def test_decoders_of_transformers_are_packed(family: str) -> None:
    model, made, prompts = make(family), Small(), MIXED
    count = sum(len(made(text).input_ids) for text in prompts)
    with forwards(model) as seen:
        gim.attribute(model, made, prompts, baseline=3, target=5)
    # Two tokens are nobody's; the first pack is held against one of its prompts alone.
    assert shapes(seen)[0] == (1, count + 2) and len(shapes(seen)) == 2, seen
    with forwards(model) as seen:
        found = assert_each_alone(model, made, prompts, 1e-12, baseline=3, target=5)
    assert shapes(seen)[0] == (1, count + 2) and len(shapes(seen)) == 1 + len(prompts), "proved once"
    assert all(f"{len(prompts)} prompts packed in one row" in one.memory for one in found)


@pytest.mark.parametrize("family", first(("bert", "modernbert", "gpt-oss", "falcon"), ("bert", "falcon")))
def test_models_that_see_other_documents_are_padded(family: str) -> None:
    """Encoders; and decoders of transformers that do not hand positions on to what makes their masks."""
    model, made = make(family), Small()
    for attempt in range(2):
        with forwards(model) as seen:
            found = assert_each_alone(model, made, PROMPTS, 1e-12, baseline=3, target=5, position=2)
        packed = (1, sum(len(made(text).input_ids) for text in PROMPTS) + 2)
        assert shapes(seen).count(packed) == (attempt == 0), "found out once"
        assert any(shape[0] > 1 for shape in shapes(seen))
    assert any("rows of one batch; not packed, for " in one.memory for one in found)


class Mixer(nn.Module):
    """Layers of one's own that mix tokens; the rest is Llama's."""

    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = make("llama")
        self.inner.model.layers[1].register_forward_pre_hook(lambda _, given: (mix(given[0]), *given[1:]))

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits


def _recurrent(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * x.cumsum(1)


def _convolution(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def _from_behind(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


def _frozen(x: torch.Tensor) -> torch.Tensor:
    """What flows from other documents has no gradient."""
    return x + 0.1 * x.detach().cumsum(1)


def _counted(x: torch.Tensor) -> torch.Tensor:
    """Absolute positions that no argument tells."""
    return x + 0.1 * torch.arange(x.shape[1], dtype=x.dtype)[:, None].sin()


@pytest.mark.parametrize("mix", [_recurrent, _convolution, _from_behind, _frozen, _counted])
def test_what_mixes_documents_or_counts_by_itself_is_found_out(mix: Any) -> None:
    model, made = Mixer(mix), Small()
    if mix is _frozen:
        options: dict[str, Any] = {"strict": False}
    else:
        options = {}
    found = gim.attribute(model, made, PROMPTS, baseline=3, target=5, **options)
    assert anatomy.of(model).packing.refused
    assert not any("packed in one row" in one.memory for one in found)
    for text, one in zip(PROMPTS, found, strict=True):
        want = gim.attribute(model, made, text, baseline=3, target=5, **options)
        torch.testing.assert_close(one.scores, want.scores, rtol=0, atol=KEPT * float(want.scores.abs().max()))


def test_a_model_that_takes_no_positions_is_padded() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("llama")

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            return self.inner(input_ids, attention_mask=attention_mask).logits

    model, made = Own(), Small()
    found = assert_each_alone(model, made, PROMPTS, 1e-12, baseline=3, target=5)
    assert "position_ids cannot be given to Own" in anatomy.of(model).packing.refused
    assert any("rows of one batch; not packed, for position_ids" in one.memory for one in found)


def test_recurrent_models_of_transformers_fall_back() -> None:
    torch.manual_seed(0)
    model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2))
    model = model.double().eval()
    found = assert_each_alone(model, Small(), PROMPTS, 1e-12, baseline=3, target=5, strict=False)
    assert not any("packed in one row" in one.memory for one in found) and anatomy.of(model).packing.refused


def test_a_classifier_has_one_row_of_logits() -> None:
    model, made = make("bert-classifier"), Small()
    assert_each_alone(model, made, PROMPTS, 1e-12, baseline=3, target=2)
    assert "one row of logits for each prompt" in anatomy.of(model).packing.refused


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_adapters(kind: str) -> None:
    import peft

    torch.manual_seed(0)
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    model = peft.get_peft_model(make("llama"), configs[kind]()).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of position ids that it drops
        found = assert_each_alone(model, Small(), PROMPTS, 1e-12, baseline=3, target=5)
    assert any("packed in one row" in one.memory for one in found) is (kind == "lora")


def test_a_model_that_changes_is_proved_again(model: Any) -> None:
    changed, made = text_model(), tokenizer()
    gim.attribute(changed, made, PROMPTS)
    assert anatomy.of(changed).packing.proved
    inner = changed.model.layers[1].mlp

    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _recurrent(self.inner(x))

    changed.model.layers[1].mlp = Leaks()
    assert_each_alone(changed, made, PROMPTS, 1e-12)
    assert not anatomy.of(changed).packing.proved and anatomy.of(changed).packing.refused


def test_a_pack_of_a_proved_model_that_leaks_is_found_out(model: Any) -> None:
    """Not a module has changed; every pack has two tokens that nobody may read."""
    changed, made = text_model(), tokenizer()
    gim.attribute(changed, made, PROMPTS)
    changed.model.layers[1].register_forward_pre_hook(lambda _, given: (_recurrent(given[0]), *given[1:]))
    found = assert_each_alone(changed, made, PROMPTS, 1e-12)
    assert not any("packed in one row" in one.memory for one in found)


# What may be asked of a pack


@pytest.mark.parametrize(
    ("rules", "measure"),
    first(
        itertools.product(("GIM", "GIM_CONSTANT", "ATTNLRP", "GRADIENT"), MEASURES),
        (("GIM", "logit"), ("GIM_CONSTANT", "logodds"), ("GRADIENT", "logprob")),
    ),
)
def test_every_measure_and_target(model: Any, rules: str, measure: Any) -> None:
    prompts = MIXED
    found = assert_each_alone(model, tokenizer(), prompts, 1e-12, rules=rules, measure=measure, target=TARGETS)
    assert all(f"{len(prompts)} prompts packed in one row" in one.memory for one in found)


@pytest.mark.parametrize(
    "memory",
    first(
        ("none", "layer", "layer+attention", "mlp", "layer+attention+tile=16", "none+head=all"),
        ("mlp", "layer+attention+tile=16", "none+head=all"),
    ),
)
def test_every_plan(model: Any, memory: str) -> None:
    found = assert_each_alone(model, tokenizer(), PROMPTS, 1e-12, memory=memory, target=TARGETS[:6])
    assert any("packed in one row" in one.memory for one in found)


@pytest.mark.parametrize("per", ["layer", "head"])
def test_what_is_inside_is_each_prompts_own(model: Any, per: Any) -> None:
    made = tokenizer()
    found = gim.attribute(model, made, PROMPTS, per=per)
    for text, one in zip(PROMPTS, found, strict=True):
        want = gim.attribute(model, made, text, per=per)
        size = float(want.scores.abs().max())
        torch.testing.assert_close(one.scores, want.scores, rtol=0, atol=KEPT * size)
        assert "packed in one row" in one.attribution.memory


def test_a_position_inside_and_other_engines(model: Any) -> None:
    assert_each_alone(model, tokenizer(), PROMPTS[:4], 1e-12, position=1)
    assert_each_alone(model, tokenizer(), PROMPTS[:3], 1e-12, engine="reference")


def test_float64_to_the_last_digits(model: Any) -> None:
    made = tokenizer()
    ones = [
        Single.of(
            Asked.of(
                model, made, text, baseline=None, rules="GIM", memory="none", progress=None, allow_extrapolation=False,
                strict=True, engine="auto", segments=None, template_arguments=None,
            ),
            target, None, None,
        )
        for text, target in zip(MIXED, TARGETS, strict=True)
    ]  # fmt: skip
    found = ones[0].asked.run([one.wanted for one in ones], "logit", packed=True)
    for row, one in enumerate(ones):
        want, count = one.asked.run([one.wanted], "logit"), len(one.wanted.ids)
        assert want.scores.dtype == torch.float64
        torch.testing.assert_close(found.scores[row, :count], want.scores[0], rtol=1e-12, atol=1e-12)
        assert not found.scores[row, count:].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_float32(device: str) -> None:
    found = assert_each_alone(text_model(torch.float32).to(device), tokenizer(), PROMPTS, 1e-5)
    assert any("packed in one row" in one.memory for one in found)


# Which prompts are


def test_rows_of_one_length_need_no_packing(model: Any) -> None:
    with forwards(model) as seen:
        found = gim.attribute(model, tokenizer(), [PROMPTS[0]] * 3)
    assert [shape[0] for shape in shapes(seen)] == [3]
    assert {one.memory.split("; ")[-1] for one in found} == {"3 prompts as rows of one batch"}


def test_packs_are_bounded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [len(tokenizer()(text).input_ids) for text in PROMPTS]
    monkeypatch.setattr(many, "BATCH_TOKENS", max(lengths) + min(lengths))
    with forwards(model) as seen:
        gim.attribute(model, tokenizer(), PROMPTS)
    found = shapes(seen)
    assert all(rows * length <= many.BATCH_TOKENS + 2 for rows, length in found) and len(found) < len(PROMPTS)
    monkeypatch.setattr(many, "BATCH_LOGITS", 1)
    with forwards(model) as seen:
        gim.attribute(model, tokenizer(), PROMPTS)
    assert sorted(length for _, length in shapes(seen)) == sorted(lengths)


def test_memory_that_runs_out_leaves_a_model_packed_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, run = text_model(), tokenizer(), Asked.run

    def run_out(asked: Asked, wanted: Any, *rest: Any, **named: Any) -> Any:
        if len(wanted) > 1:
            raise gim.OutOfMemoryError("too much", gim.MemoryPlan(), None, None)
        return run(asked, wanted, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Asked, "run", run_out)
        assert_each_alone(model, made, PROMPTS, 1e-12)
    found = gim.attribute(model, made, PROMPTS)
    assert any("packed in one row" in one.memory for one in found)


def test_a_prompt_that_fails_says_nothing_of_the_model() -> None:
    model, made = text_model(), tokenizer()
    poison = made.encode(" rat", add_special_tokens=False)[-1]

    def spoil(_: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.where((given[0] == poison)[..., None], torch.nan, out)

    handle = model.get_input_embeddings().register_forward_hook(spoil)
    with pytest.raises(gim.PromptError):
        gim.attribute(model, made, PROMPTS)
    handle.remove()
    assert not anatomy.of(model).packing.refused


def test_rows_in_one() -> None:
    given = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 0, 0, 0], [0, 4, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0]]).bool()
    rows = Rows.in_one(given, mask)
    assert rows.ids[0, 1:-1].tolist() == [5, 6, 7, 8, 9, 4]
    assert rows.position_ids is not None and rows.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 0, 0]]
    columns = rows.columns(torch.tensor([[2, 4], [0, 1], [1, 1]]))
    assert rows.ids[0][columns].tolist() == [[5, 7], [8, 9], [4, 4]]
    scores = torch.arange(8.0)[None]
    assert rows.as_given(scores).tolist() == [[0, 0, 1, 2, 3], [4, 5, 0, 0, 0], [0, 6, 0, 0, 0]]
    heads = torch.stack([scores, 10 * scores], 1)
    assert rows.summed(heads).tolist() == [[6, 60], [9, 90], [6, 60]]
    for one in (Rows.of(given, mask), Rows.of(given, None)):
        x = torch.rand(3, 2, one.ids.shape[1])
        assert torch.equal(one.summed(x), x.sum(-1))
