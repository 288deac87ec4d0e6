"""Scores of a model's layers and heads: against the model's own code with the rules written again, and as results."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from typing import Any

import pytest
import torch
import transformers as hf
from rich.console import Console
from torch import nn

import gim
from gim import scoring, taps
from gim.estimate import Twin
from gim.intercept.flow import origin
from gim.plan import MemoryPlan
from gim.report import layerwise
from gim.targets import Per
from tests import model_code
from tests.eager import PRESETS
from tests.families import ENCODERS, FAMILIES, SHARED, ids, make, text_model, tokenizer
from tests.first import first
from tests.gim.test_cli import run
from tests.gim.test_memory import EVERYTHING, SOME
from tests.live import peak_bytes
from tests.oracle import (
    FLOAT64_MODEL_RELATIVE,
    FLOAT64_PLAN_RELATIVE,
    INSIDE_TIMES,
    assert_close64,
    assert_memory_close,
)

LENGTH, TARGET, BASELINE = 19, 2, 3
PERS: tuple[Per, ...] = ("layer", "head")
TEXT = "The cat sat on the mat and the cat ate"


def inside(model: Any, tokens: torch.Tensor, per: Per | None, plan: MemoryPlan = EVERYTHING, **rest: Any) -> Any:
    """One attribution by the package."""
    rules, mask = rest.get("rules", "GIM"), rest.get("mask")
    last = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1) if mask is None else mask.sum(-1, keepdim=True) - 1
    terms = scoring.Terms(last, torch.full_like(last, TARGET), torch.ones_like(last), "logit")
    request = scoring.Request.of(tokens, mask, terms, per=per)
    return scoring.run(model, request, BASELINE, gim.rules.get(rules), plan, None)


#: One of each layout; the others repeat the proof.
LAYOUTS = ("llama", "gemma2", "gpt2", "gpt-neox", "modernbert")


@pytest.mark.parametrize("family", first((*FAMILIES, *ENCODERS), LAYOUTS))
@pytest.mark.parametrize("rules", first(("GIM", "GRADIENT"), ("GIM",)))
def test_against_the_models_own_code(family: str, rules: str) -> None:
    model, tokens, parts = make(family), ids(2, LENGTH), {**FAMILIES, **ENCODERS}[family]
    layers = model.get_submodule(parts.layers)
    want = model_code.inside(model, tokens, PRESETS[rules], parts.products, layers=layers, target=TARGET)
    with model_code.Wide():
        plain, *both = (inside(model, tokens, per, rules=rules) for per in (None, *PERS))
    for per, scores, found in zip(PERS, want, both, strict=True):
        assert_close64(found.inside, scores, f"{family} {rules} {per}", relative=FLOAT64_MODEL_RELATIVE)
        assert torch.equal(found.scores, plain.scores)
    assert plain.inside is None


@pytest.mark.parametrize("per", PERS)
def test_every_plan_gives_the_same(per: Per) -> None:
    model, tokens = make("gemma2"), ids(2, LENGTH)
    want = inside(model, tokens, per)
    for plan in SOME:
        found = inside(model, tokens, per, plan)
        assert_close64(found.inside, want.inside, f"{per} under {plan}", relative=FLOAT64_PLAN_RELATIVE)
        assert_close64(found.scores, want.scores, f"tokens under {plan}", relative=FLOAT64_PLAN_RELATIVE)


@pytest.mark.parametrize("per", PERS)
def test_a_padded_row_is_what_it_is_alone(per: Per) -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 11:] = False
    found = inside(model, tokens, per, mask=mask)
    alone = inside(model, tokens[1:, :11], per).inside[0]
    assert_close64(
        found.inside[1][:, :11] if per == "layer" else found.inside[1],
        alone,
        f"{per} of a padded row",
        relative=FLOAT64_PLAN_RELATIVE,
    )
    if per == "layer":
        assert not found.inside[1][:, 11:].any()


@pytest.mark.parametrize("per", PERS)
def test_virtual_tokens_of_a_wrapper(per: Per) -> None:
    peft = pytest.importorskip("peft")
    model = make("llama", torch.float32)
    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, tokenizer_name_or_path=None)
    ).eval()
    tokens = ids(1, LENGTH)
    found = inside(tuned, tokens, per).inside[0]
    # The same embeddings put in front by hand.
    table = model.get_input_embeddings().weight.detach()
    prompt = tuned.get_prompt(1).detach()
    embedded = torch.cat([prompt, table[tokens]], 1).requires_grad_()
    want: list[torch.Tensor] = []
    with gim.GIM(model):
        held = [
            layer.register_forward_pre_hook(lambda _, given, named: want.append(given[0]), with_kwargs=True)
            for layer in model.model.layers
        ]
        outputs = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: want.append(given[0]))
            for layer in model.model.layers
        ]
        logits = model(inputs_embeds=embedded).logits
        grads = torch.autograd.grad(logits[0, -1, TARGET], want)
    for handle in (*held, *outputs):
        handle.remove()
    seen = [(x.detach() * grad)[0] for x, grad in zip(want, grads, strict=True)]
    if per == "layer":
        for row, one in zip(found, seen[::2], strict=True):
            torch.testing.assert_close(row, one.sum(-1)[4:], rtol=1e-4, atol=1e-5)
    else:
        for row, one in zip(found, seen[1::2], strict=True):
            torch.testing.assert_close(row, one.unflatten(-1, (len(row), -1)).sum((0, 2)), rtol=1e-4, atol=1e-5)


def test_float16_undoes_the_scale_of_its_seed() -> None:
    """The explained number's gradient is 2 ** 8 there, and so is what each layer sees."""
    model, tokens = make("llama", torch.float32), ids(1, LENGTH)
    want = inside(model, tokens, "layer").inside
    found = inside(model.half(), tokens, "layer").inside
    assert math.isclose(float(found.abs().sum()), float(want.abs().sum()), rel_tol=0.02)


class Elsewhere(nn.Module):
    """Attention whose softmax is written out, with heads or without."""

    def __init__(self, attention: Any, heads: bool) -> None:
        super().__init__()
        self.inner, self.heads = attention, heads

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        inner = self.inner
        batch, length, width = hidden_states.shape
        q, k, v = (
            one(hidden_states).view(batch, length, -1, inner.head_dim).transpose(1, 2)
            for one in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        shape = q.shape
        if not self.heads:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (q @ k.mT * inner.scaling).masked_fill(later, -math.inf).softmax(-1)
        out = torch.matmul(weights, v).view(shape)
        return inner.o_proj(out.transpose(1, 2).reshape(batch, length, width)), None


def test_attention_that_a_model_writes_out() -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    attention = model.model.layers[1].self_attn
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn = Elsewhere(attention, heads=True)
    found = inside(model, tokens, "head").inside[0, 1]
    handle = attention.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with gim.GIM(model):
        (grad,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[0, -1, TARGET], seen)
    handle.remove()
    assert_close64(
        found,
        (seen[0].detach() * grad)[0].unflatten(-1, (len(found), -1)).sum((0, 2)),
        "written out",
        relative=FLOAT64_PLAN_RELATIVE,
    )
    model.model.layers[1].self_attn = Elsewhere(attention, heads=False)
    with pytest.raises(gim.UnsupportedModelError, match=r"model.layers.1: its attention's output is \["):
        inside(model, tokens, "head")


def test_what_has_no_layers_or_heads_to_see() -> None:
    tokens = ids(1, LENGTH)
    twice = make("llama")
    twice.model.layers[2] = twice.model.layers[1]
    with pytest.raises(gim.UnsupportedModelError, match=r"layers\.\d.*runs 2 times|runs more than once"):
        inside(twice, tokens, "layer")
    few = make("llama")
    few.config.num_hidden_layers = 2  # transformers runs as many as this
    with pytest.raises(gim.UnsupportedModelError, match=r"model.layers.2: LlamaDecoderLayer runs 0 times"):
        inside(few, tokens, "head")
    uneven = make("llama")
    uneven.model.layers[1].self_attn = hf.models.llama.modeling_llama.LlamaAttention(
        hf.LlamaConfig(**{**SHARED, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}), 1
    ).to(torch.float64)
    with pytest.raises(gim.UnsupportedModelError, match=r"model.layers.1: has 2 heads and model.layers.0 has"):
        inside(uneven, tokens, "head")


def test_a_statistic_from_before_a_layer_is_one_inside_it() -> None:
    """A stream that is looked at is to the rules what it was: a norm may read its length from the layer before."""
    seen: list[torch.Tensor] = []
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    stream = x * 2.0
    length = stream.pow(2).mean(-1, keepdim=True).rsqrt()
    looked_at = taps._tapped(stream, lambda value, grad: seen.extend((value, grad)))
    one, two = origin(looked_at), origin(length)
    assert one == origin(stream) and two.reduced is not None and two.reduced.root == one.root
    weights = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.autograd.grad((looked_at * weights).sum(), x)
    assert torch.equal(seen[0], stream) and torch.equal(seen[1], weights)


def test_nothing_is_left_behind() -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    before = [dict(module.__dict__) for module in model.modules()]
    inside(model, tokens, "layer")
    inside(model, tokens, "head")
    after = [dict(module.__dict__) for module in model.modules()]
    assert [one.keys() for one in before] == [one.keys() for one in after]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "layer"])
def test_memory_is_that_of_an_attribution(plan: str) -> None:
    """And, where no checkpoint keeps them anyway, each layer's input; the estimate knows."""
    torch.manual_seed(0)
    settings = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 9}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=512, num_key_value_heads=3, **settings)).eval()
    tokens, chosen = ids(1, 256), MemoryPlan.parse(plan)
    streams = 4 * 256 * 288 * model.config.num_hidden_layers if plan == "none" else 0

    def peak(per: Per | None) -> int:
        inside(model, tokens, per, chosen)
        return peak_bytes(lambda: inside(model, tokens, per, chosen))[0]

    alone = peak(None)
    for per, more in zip(PERS, (streams, 0), strict=True):
        found = peak(per)
        assert found <= 1.01 * (alone + more), per
        assert_memory_close(Twin(model, gim.rules.GIM, per=per).estimate(chosen, 256).activations, found, per)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "layer"])
def test_time_is_that_of_an_attribution(plan: str) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 9}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=512, num_key_value_heads=3, **settings)).eval()
    tokens, chosen = ids(1, 512), MemoryPlan.parse(plan)
    taken: dict[Per | None, list[float]] = {None: [], "layer": [], "head": []}
    for _ in range(8):
        for per, times in taken.items():
            start = time.process_time()
            inside(model, tokens, per, chosen)
            times.append(time.process_time() - start)
    least = {per: min(times[1:]) for per, times in taken.items()}  # the first forward is watched
    for per in PERS:
        assert least[per] <= INSIDE_TIMES * least[None], per


# ---- as a result


@pytest.fixture(scope="module")
def model() -> Any:
    return text_model()


@pytest.fixture(scope="module", params=PERS)
def found(request: pytest.FixtureRequest, model: Any) -> gim.LayerwiseAttribution:
    made: gim.LayerwiseAttribution = gim.attribute(model, tokenizer(), TEXT, per=request.param)
    return made


def test_a_result_has_the_tokens_beside_it(model: Any, found: gim.LayerwiseAttribution) -> None:
    plain = gim.attribute(model, tokenizer(), TEXT)
    assert found.attribution == dataclasses.replace(plain, report=found.attribution.report)
    layers = model.config.num_hidden_layers
    assert found.layers == tuple(f"model.layers.{index}" for index in range(layers))
    shape = (layers, len(plain)) if found.per == "layer" else (layers, model.config.num_attention_heads)
    assert found.scores.shape == shape


def test_the_strongest(found: gim.LayerwiseAttribution) -> None:
    best = found.top(5)
    shown = found.scores.abs().masked_fill(torch.tensor(found.aside), 0)
    assert abs(best[0].score) == float(shown.max()) and [one.rank for one in best] == [1, 2, 3, 4, 5]
    assert all(float(found.scores[one.layer, one.column]) == one.score for one in best)
    if found.per == "layer":
        assert found.aside[0] and all(one.column for one in found.top(1000))
    with pytest.raises(ValueError, match="k must be a whole number >= 1, got 0"):
        found.top(0)
    assert found.name(best[0]) in repr(found)


def test_lists_of_prompts(model: Any, found: gim.LayerwiseAttribution) -> None:
    made = gim.attribute(model, tokenizer(), [TEXT, TEXT[:20], "A cat"], per=found.per)
    torch.testing.assert_close(made[0].scores, found.scores, rtol=1e-5, atol=1e-6)
    alone = gim.attribute(model, tokenizer(), TEXT[:20], per=found.per)
    torch.testing.assert_close(made[1].scores, alone.scores, rtol=1e-5, atol=1e-6)


def test_json_and_data_frames(found: gim.LayerwiseAttribution, tmp_path: Any) -> None:
    text = found.to_json(tmp_path / "a.json")
    assert gim.LayerwiseAttribution.from_json(text) == found == gim.LayerwiseAttribution.from_json(tmp_path / "a.json")
    frame = found.to_dataframe()
    assert len(frame) == found.scores.numel()
    row = frame[(frame["layer"] == 1) & (frame["position" if found.per == "layer" else "head"] == 2)]
    assert float(row["score"].iloc[0]) == float(found.scores[1, 2])
    with pytest.raises(ValueError, match="no field schema"):
        gim.Attribution.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("per", "token", "field 'per' must be one of"),
        ("layers", ["a"], "field 'scores' must have"),
        ("scores", [[1.0]], "field 'scores' must have"),
        ("scores", "x", "field 'scores' must be a list"),
        ("attribution", {}, "is not an attribution"),
    ],
)
def test_documents_that_are_none(found: gim.LayerwiseAttribution, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gim.LayerwiseAttribution.from_json(json.dumps({**found.to_dict(), field: value}))
    ragged = [row[: len(row) - (place == 1)] for place, row in enumerate(found.scores.tolist())]
    with pytest.raises(ValueError, match="numbers in each row"):
        gim.LayerwiseAttribution.from_json(json.dumps({**found.to_dict(), "scores": ragged}))


def test_what_is_refused(model: Any, found: gim.LayerwiseAttribution) -> None:
    with pytest.raises(ValueError, match=r"per must be one of \('token', 'layer', 'head'\), got 'neuron'"):
        gim.attribute(model, tokenizer(), TEXT, per="neuron")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="per='layer' is of one explained number"):
        gim.attribute(model, tokenizer(), TEXT, per="layer", answer=" rat")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="scores must be float32 of shape"):
        dataclasses.replace(found, scores=found.scores[:1])
    with pytest.raises(ValueError, match="scores must be finite"):
        dataclasses.replace(found, scores=found.scores * math.nan)


def test_pages_pictures_and_notebooks(model: Any, tmp_path: Any) -> None:
    for per in PERS:
        found = gim.attribute(model, tokenizer(), TEXT + " </table><b>\u202e", per=per)
        page = found.to_html(tmp_path / "a.html")
        cell = found._repr_html_()
        for shown in (page, cell):
            assert "</table><b>" not in shown and "\u202e" not in shown
            one = found.top(1)[0]
            said = f"{one.score:+.3g}"
            assert f": {said}" in shown or f": {said.replace('+0.', '+0.')}" in shown
        assert page.count("<td") >= found.scores.numel() - len(found.attribution)
        found.to_png(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_prompt_shows_its_strongest_tokens(model: Any) -> None:
    found = gim.attribute(model, tokenizer(), TEXT * 20, per="layer")
    page = found.to_html()
    assert f"The 40 strongest of {len(found.attribution)} tokens" in page
    assert f"layer {found.top(1)[0].layer}: " in page


def test_a_map_is_of_words_and_stands_below_what_is_explained(model: Any) -> None:
    found = gim.attribute(model, tokenizer(), TEXT, per="layer")
    count = len(found.attribution)
    attribution = dataclasses.replace(found.attribution, template=(True,) * (count - 3) + (False,) * 3)
    shown = layerwise.Map.of(dataclasses.replace(found, attribution=attribution), 20)
    assert len(shown.rows) == 3 - sum(attribution.special[-3:]) and not any(shown.aside)
    assert "Every token but the" in shown.hint and shown.corner == "token \\ layer"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    assert text.index("Target") < text.index("Tokens by layer") and text.count("Target") == 1


def test_the_command_line(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    common = ("explain", "--model", str(tmp_path / "model"), "--prompt", TEXT)
    for per, title in zip(PERS, ("Tokens by layer", "Heads by layer"), strict=True):
        out = run(*common, "--per", per, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"))
        assert out.code == 0, out.err
        want = gim.attribute(model, tokenizer(), TEXT, per=per)
        found = gim.LayerwiseAttribution.from_json(tmp_path / "a.json")
        torch.testing.assert_close(found.scores, want.scores, rtol=1e-4, atol=1e-5)
        assert title in out.out and title in (tmp_path / "a.html").read_text()
        shown = run("show", str(tmp_path / "a.json"))
        assert shown.code == 0 and shown.out in out.out
    both = run("show", str(tmp_path / "a.json"), str(tmp_path / "a.json"), "--html", str(tmp_path / "b.html"))
    assert both.code == 0 and "Words whose share" in (tmp_path / "b.html").read_text()
    refused = run(*common, "--per", "layer", "--answer", " rat")
    assert refused.code == 2 and "--answer and --per cannot both be given" in refused.err
