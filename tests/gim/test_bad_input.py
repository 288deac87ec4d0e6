"""Bad input gets an error that names the argument, what was wanted and what came; nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gim
import gim.demo
from gim.applied import UnsupportedModelError
from gim.context import inspect
from gim.intercept.attention import gim_attention
from gim.intercept.masks import key_pattern
from tests.families import SHARED, VOCABULARY, ids, make
from tests.oracle import assert_within_budget


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama", torch.float32)


def explain(model: Any, tokens: Any = None, **arguments: Any) -> torch.Tensor:
    tokens = ids() if tokens is None else tokens
    return gim.explain(model, tokens, **{"baseline_token_id": 3, **arguments})


HOLES = torch.ones(2, 37, dtype=torch.int64)
HOLES[1, 5] = 0
NO_TOKEN = torch.ones(2, 37, dtype=torch.int64)
NO_TOKEN[1] = 0
LEFT = torch.ones(2, 37, dtype=torch.int64)
LEFT[0, :9] = 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": torch.zeros(0, dtype=torch.int64)}, ValueError, "input_ids must hold at least one token"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "input_ids must hold at least one token"),
        ({"tokens": [1, 2]}, TypeError, "input_ids must be a tensor, got list"),
        ({"tokens": torch.zeros(3)}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
        ({"tokens": torch.zeros(1, 2, 3, dtype=torch.int64)}, ValueError, r"shape \[T\] or \[B, T\], got \(1, 2, 3\)"),
        ({"tokens": torch.tensor([1, VOCABULARY])}, ValueError, "input_ids must be in 0..96, got ids from 1 to 97"),
        ({"tokens": torch.tensor([-1, 2])}, ValueError, "input_ids must be in 0..96, got ids from -1 to 2"),
        ({"target_token_id": 97}, ValueError, "target_token_id must be a token id in 0..96, got 97"),
        ({"target_token_id": -1}, ValueError, "target_token_id must be a token id in 0..96, got -1"),
        ({"target_token_id": [1]}, ValueError, "must be one id, or a list or tensor of 2, .* got 1 of them"),
        ({"target_token_id": (1, 2, 3)}, ValueError, "target_token_id must be one id, .* got 3 of them"),
        ({"target_token_id": []}, ValueError, "target_token_id must be one id, .* got 0 of them"),
        ({"target_token_id": torch.tensor([[1], [2]])}, ValueError, r"got a tensor of shape \(2, 1\)"),
        ({"target_token_id": torch.tensor([1.0, 2.0])}, TypeError, "must hold integers, got a tensor of torch.float32"),
        ({"target_token_id": torch.tensor([True, False])}, TypeError, "must hold integers, got a tensor of torch.bool"),
        ({"target_token_id": [1, 97]}, ValueError, r"target_token_id\[1\] must be a token id in 0..96, got 97"),
        ({"target_token_id": torch.tensor([-1, 2])}, ValueError, r"target_token_id\[0\] must be .* got -1"),
        ({"target_token_id": [1, None]}, TypeError, r"target_token_id\[1\] must be an integer, got None"),
        ({"target_token_id": [1, True]}, TypeError, r"target_token_id\[1\] must be an integer, got True"),
        ({"target_token_id": [1, 2.0]}, TypeError, r"target_token_id\[1\] must be an integer, got 2.0"),
        ({"target_token_id": "cat"}, ValueError, "target_token_id must be a token id in 0..96, got 'cat'"),
        ({"baseline_token_id": 97}, ValueError, "baseline_token_id must be a token id in 0..96, got 97"),
        ({"baseline_token_id": None}, ValueError, "baseline_token_id or tokenizer must be given"),
        ({"target_position": 37}, ValueError, "target_position must be in -37..36, got 37"),
        ({"target_position": -38}, ValueError, "target_position must be in -37..36, got -38"),
        ({"target_position": 1.5}, TypeError, "target_position must be an integer, got float"),
        ({"target_position": 4, "attention_mask": LEFT}, ValueError, "target_position 4 is padding in row 0"),
        ({"target_position": -29, "attention_mask": LEFT}, ValueError, "target_position must be at least -28"),
        ({"attention_mask": HOLES}, ValueError, "attention_mask must have no holes: row 1"),
        ({"attention_mask": NO_TOKEN}, ValueError, "attention_mask must leave each row a token, got none in row 1"),
        ({"attention_mask": LEFT[:, :5]}, ValueError, "attention_mask must have the shape of input_ids"),
        ({"attention_mask": 2 * LEFT}, ValueError, "attention_mask must hold 0 and 1 only"),
        ({"attention_mask": "left"}, TypeError, "attention_mask must be a tensor, got str"),
        ({"rules": "GIN"}, ValueError, "rules must be Rules or one of GIM, .*got 'GIN'"),
        ({"rules": 3}, TypeError, "rules must be Rules or the name of a preset, got int"),
        ({"rules": "GRADIENT", "q_scale": 0.1}, ValueError, "contradict each other"),
        ({"softmax_temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
        ({"softmax_temperature": -2.0}, ValueError, "temperature must be > 0, got -2.0"),
        ({"q_scale": float("nan")}, ValueError, "q_scale must be a finite number, got nan"),
        ({"freeze_norm": 1}, ValueError, "freeze_norm must be True or False, got 1"),
        ({"memory": "some"}, ValueError, "memory must be a MemoryPlan, 'auto' or one of .*got 'some'"),
    ],
)
def test_explain_refuses(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    before = dict(vars(model.config))
    with pytest.raises(error, match=message):
        explain(model, **arguments)
    assert dict(vars(model.config)) == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_one_token_works(model: Any) -> None:
    assert explain(model, torch.tensor([5])).shape == (1,)
    assert explain(model, torch.tensor([[5]])).shape == (1,)
    assert float(explain(model, torch.tensor([3]))) == 0.0  # the baseline itself


def test_rules_refuse_unknown_values() -> None:
    with pytest.raises(ValueError, match="softmax must be one of"):
        gim.rules.Rules(softmax="soft")
    with pytest.raises(ValueError, match="activation must be one of"):
        gim.rules.Rules(activation="lrp")
    with pytest.raises(ValueError, match=r"unknown fields of Rules: \['qscale'\]"):
        gim.rules.Rules.from_dict({"qscale": 1})
    with pytest.raises(ValueError, match="checkpoint must be one of"):
        gim.MemoryPlan("some")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        gim.GIM("gpt2")


@pytest.mark.parametrize("model", ["gpt2", None, ("a model", "a tokenizer")], ids=str)
def test_what_is_no_model_says_how_to_load_one(model: Any) -> None:
    way = "unpack what gim.load gives" if isinstance(model, tuple) else "load it with gim.load"
    wanted = rf"model must be a torch.nn.Module, got {type(model).__name__}: {way}"
    _, tokenizer = gim.demo.load()
    for call in (
        lambda: gim.attribute(model, tokenizer, "a b"),
        lambda: gim.attribute(model, tokenizer, ["a b", "c"]),
        lambda: gim.attribute(model, tokenizer, "a b", answer=" c"),
        lambda: gim.attribute(model, tokenizer, "a b", generate=1),
        lambda: gim.explain(model, torch.tensor([1, 2])),
        lambda: gim.evaluate(model, tokenizer, ["a b"]),
        lambda: inspect(model),
        lambda: gim.GIM(model),
    ):
        with pytest.raises(TypeError, match=wanted):
            call()


def test_inference_mode_is_refused_and_no_grad_works(model: Any) -> None:
    want = explain(model)
    with torch.no_grad():
        assert torch.equal(explain(model), want)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        explain(model)


def test_dropout_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHARED, attention_dropout=0.5)).train()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn: attention dropout is 0.5"):
        explain(model)
    model = make("llama", torch.float32)
    model.model.dropout = nn.Dropout(0.1).train()
    with pytest.raises(ValueError, match=r"model\.dropout is in training mode with p=0.1: call model.eval"):
        explain(model)
    assert explain(model.eval()).shape == (2, 37)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_module_with_nan_or_infinity_is_named(value: float) -> None:
    model = make("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"logits hold NaN or infinity.* is model\.layers\.1\.mlp\.up_proj$"):
        explain(model)


def test_the_first_module_with_a_nan_gradient_is_named() -> None:
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * float("nan")

    model = make("llama", torch.float32)
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, inputs: (Break.apply(inputs[0]),))
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    # What goes into down_proj is gate and up's product, so theirs are the first outputs with a bad gradient.
    with pytest.raises(
        FloatingPointError, match=r"first module whose output's gradient.*layers\.1\.mlp\.(gate|up)_proj"
    ):
        explain(model)
    assert before == {name: parameter.grad for name, parameter in model.named_parameters()}


class StrangeNorm(nn.Module):
    """Over the largest number of each row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.abs().amax(-1, keepdim=True)


def with_strange_norm() -> Any:
    model = make("llama", torch.float32)
    model.model.layers[1].input_layernorm = StrangeNorm(SHARED["hidden_size"])
    return model


def with_no_attention() -> Any:
    """A model whose attention is none: a linear map."""
    model = make("llama", torch.float32)
    attention = model.model.layers[1].self_attn

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return attention.o_proj(attention.q_proj(hidden_states)), None

    attention.forward = forward
    return model


def with_a_sum_for_a_gate() -> Any:
    model = make("llama", torch.float32)
    mlp = model.model.layers[2].mlp

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) + mlp.up_proj(x))

    mlp.forward = forward
    return model


def with_a_norm_by_its_function() -> Any:
    """A norm that the model owns and computes without calling it."""
    model = make("llama", torch.float32)
    layer = model.model.layers[0]
    norm, attention, mlp = layer.input_layernorm, layer.self_attn, layer.mlp

    def forward(hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(hidden_states, norm.weight.shape, norm.weight, 1e-6)
        hidden_states = hidden_states + attention(hidden_states=normed, **named)[0]
        return hidden_states + mlp(layer.post_attention_layernorm(hidden_states))

    layer.forward = forward
    return model


@pytest.mark.parametrize(
    ("build", "counts"),
    [
        (with_strange_norm, (3, 7, 3)),
        (with_no_attention, (2, 7, 3)),
        (with_a_sum_for_a_gate, (3, 7, 2)),
        (with_a_norm_by_its_function, (3, 7, 3)),
    ],
)
def test_what_runs_is_counted_whatever_the_modules_are_called(build: Any, counts: tuple[int, int, int]) -> None:
    model = build()
    with gim.GIM(model) as report:
        model(ids())
    assert report.complete and report.watched
    assert tuple(calls for _, calls in report.counts().values()) == counts


class Rows(torch.autograd.Function):
    """x over its length, by a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        length = x.pow(2).sum(-1, keepdim=True).sqrt()
        ctx.save_for_backward(length)
        return x / length

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (length,) = ctx.saved_tensors
        return grads[0] / length


class Product(torch.autograd.Function):
    """silu(gate) times up, by a backward of its own."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], grads[0]


def with_norm_of_its_own() -> Any:
    model = make("llama", torch.float32)
    model.model.layers[1].input_layernorm.forward = Rows.apply
    return model


def with_gate_of_its_own() -> Any:
    model = make("llama", torch.float32)
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: mlp.down_proj(Product.apply(mlp.gate_proj(x), mlp.up_proj(x)))
    return model


def with_softmax_of_its_own() -> Any:
    """A model whose attention computes by itself, without a softmax that torch knows."""
    model = make("llama", torch.float32)
    attention = model.model.layers[1].self_attn

    def forward(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        q, v = attention.q_proj(hidden_states), attention.o_proj(attention.q_proj(hidden_states))
        weights = torch.exp(q @ q.mT - (q @ q.mT).amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True) @ v, None

    attention.forward = forward
    return model


UNSUPPORTED = [
    (with_norm_of_its_own, r"model\.layers\.1\.input_layernorm: norm \(", {"freeze_norm": False}),
    (with_gate_of_its_own, r"model\.layers\.2\.mlp: gated product \(", {"gate_scale": None, "up_scale": None}),
    (
        with_softmax_of_its_own,
        r"model\.layers\.1\.self_attn: softmax over keys \(",
        {"softmax_temperature": None, "q_scale": None, "k_scale": None, "v_scale": None},
    ),
]


@pytest.mark.parametrize(("build", "message", "off"), UNSUPPORTED, ids=[build.__name__ for build, _, _ in UNSUPPORTED])
def test_a_part_that_is_not_covered_raises_and_is_named(build: Any, message: str, off: dict[str, Any]) -> None:
    model = build()
    with pytest.raises(UnsupportedModelError, match=message):
        explain(model)
    assert model.config._attn_implementation == "sdpa"
    with gim.GIM(model, strict=False) as report:
        model(ids())
    assert not report.complete
    assert {name for name, _ in report.unsupported} == {message.split(":")[0].replace("\\", "")}
    # The rule that is not asked for cannot fail.
    with gim.GIM(model, **off) as report:
        model(ids())
    assert report.complete


def test_a_model_that_says_it_cannot_switch_its_attention_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", torch.float32)
    want = explain(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert torch.equal(explain(model), want)
    assert inspect(model).complete


def test_of_a_module_in_which_no_rule_acts_on_anything_the_report_says_so() -> None:
    model = nn.Linear(2, 2)
    with gim.GIM(model) as report:
        model(torch.randn(1, 2))
    assert report.watched and report.complete
    assert [note.split(": ")[1] for note in report.notes] == [
        "the model has no attention", "the model has no norm", "the model has no gated MLP",
    ]  # fmt: skip


def test_masks_that_no_pattern_describes_are_refused(model: Any) -> None:
    dense = torch.ones(2, 1, 37, 37, dtype=torch.bool).tril()
    dense[..., 20:, 5] = False
    with (
        gim.GIM(model),
        pytest.raises(UnsupportedModelError, match=r"self_attn: attention was given a dense mask that is neither"),
    ):
        model(ids(), attention_mask=dense)
    with gim.GIM(model), pytest.raises(ValueError, match="attention_mask must have no holes: row 1"):
        model(ids(), attention_mask=HOLES)


def test_a_mask_function_of_another_shape_is_refused_where_attention_uses_it(model: Any) -> None:
    x = torch.randn(1, 4, 10, 12)
    attention = model.model.layers[1].self_attn

    def prefix(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Causal, but for four tokens that all see each other."""
        return (key <= query) | (key < 4)

    for pattern, message in (
        (key_pattern(1, 10, 10, mask_function=prefix), "its attention mask is neither causal, windowed nor"),
        (key_pattern(1, 10, 10, mask_function=prefix, use_vmap=True), "its attention mask is made with a function of"),
    ):
        with gim.GIM(model), pytest.raises(UnsupportedModelError, match=f"LlamaAttention: {message}"):
            gim_attention(attention, x, x, x, pattern)
        with pytest.raises(UnsupportedModelError, match="asks the mask for its shape"):
            _ = pattern.shape
        assert not hasattr(pattern, "shape")
        with pytest.raises(UnsupportedModelError, match="asks the mask for its entries"):
            _ = pattern[:, None]
        for used in (
            lambda mask: x + mask, lambda mask: mask + x, lambda mask: (1.0 - mask) * -1e9, lambda mask: mask == 0,
            lambda mask: ~mask, lambda mask: x.masked_fill(mask, 0.0), lambda mask: torch.where(mask, x, 0.0),
        ):  # fmt: skip
            with pytest.raises(UnsupportedModelError, match="asks the mask for its entries"):
                used(pattern)


def test_a_model_that_adds_its_mask_to_scores_itself_is_refused() -> None:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.BigBirdPegasusConfig(vocab_size=97, **sizes, **heads, attention_type="original_full")
    written = transformers.BigBirdPegasusForConditionalGeneration(config).eval()
    with gim.GIM(written), pytest.raises(UnsupportedModelError, match="asks the mask for its entries"):
        written(ids(), decoder_input_ids=ids())


def test_attention_weights_are_refused(model: Any) -> None:
    with gim.GIM(model), pytest.raises(UnsupportedModelError, match="attention was called with output_attentions"):
        model.model.layers[0].self_attn(
            torch.randn(1, 4, 48),
            position_embeddings=model.model.rotary_emb(torch.randn(1, 4, 48), torch.arange(4)[None]),
            attention_mask=None,
            output_attentions=True,
        )


def test_a_context_is_used_once_at_a_time(model: Any) -> None:
    context = gim.GIM(model)
    with context, pytest.raises(RuntimeError, match="already open"), context:
        pass
    with context as report:  # and may be opened again after it has closed
        model(ids())
    assert report.forwards == 1


def test_logits_that_do_not_depend_on_the_input_are_refused(model: Any) -> None:
    handle = model.model.norm.register_forward_hook(lambda _, __, out: out.detach())
    try:
        with pytest.raises(ValueError, match="the logits do not depend on the input embeddings"):
            explain(model)
    finally:
        handle.remove()


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHARED)).eval()
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens\.weight is on the meta device: load the"):
        inspect(model)


def test_hooks_run_and_may_change_what_they_see(model: Any) -> None:
    names = [
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
        "model.layers.1.mlp.act_fn",
        "model.layers.1.mlp.up_proj",
    ]
    seen: list[str] = []
    want = explain(model)
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name)) for name in names
    ]
    assert_within_budget(explain(model), explain(copy.deepcopy(model).double()), want, "hooked")
    assert set(seen) == set(names)
    hooked = explain(model, rules="ATTNLRP")
    for handle in handles:
        handle.remove()
    assert torch.equal(explain(model, rules="ATTNLRP"), hooked)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    changed = explain(model)
    handle.remove()
    assert not torch.allclose(changed, want)
    assert torch.equal(explain(model), want)


def test_an_implementation_set_by_the_user_is_put_back(model: Any) -> None:
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        explain(model)
        assert model.config._attn_implementation == implementation


def test_position_ids_that_do_not_fit_are_refused(model: Any) -> None:
    for places, error, message in (
        (torch.arange(5), ValueError, r"position_ids must have the shape of input_ids \(2, 37\), got \(1, 5\)"),
        (torch.zeros(2, 37), TypeError, "position_ids must be a tensor of int64 or int32"),
    ):
        with pytest.raises(error, match=message):
            explain(model, position_ids=places)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("strict", np.zeros(2)),
        ("strict", "false"),
        ("allow_extrapolation", torch.zeros(2)),
        ("engine", np.zeros(2)),
        ("per", np.zeros(2)),
        ("measure", np.zeros(2)),
    ],
)
def test_flags_and_names_of_another_type_are_named(argument: str, value: Any) -> None:
    model, tokenizer = gim.demo.load()
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must be "):
        gim.attribute(model, tokenizer, "The password of Irene is", **{argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model_or_config", None),
        ("model_or_config", "meta-llama/Llama-3.1-8B"),
        ("plans", None),
        ("plans", ["layer"]),
        ("plans", "layer"),
        ("device", "gpu"),
        ("device", ""),
        ("device", -1),
    ],
)
def test_what_no_memory_can_be_estimated_of_is_named(argument: str, value: Any) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    given = {"model_or_config": config, "device": "cpu"} | {argument: value}
    with pytest.raises((TypeError, ValueError, gim.EstimateError), match=f"^{argument} must be "):
        gim.estimate_memory(tokens=4, **given)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("resume", 3),
        ("resume", [b"path"]),
        ("grid", np.zeros(2)),
        ("protocol", np.zeros(2)),
        ("forward_dtype", torch.zeros(2)),
    ],
)
def test_arguments_of_an_evaluation_of_another_type_are_named(argument: str, value: Any) -> None:
    model, tokenizer = gim.demo.load()
    pairs = [("The password of Irene is lantern. The password of Irene is", " lantern")] * 2
    with pytest.raises((TypeError, ValueError), match=f"^{argument} must be "):
        gim.evaluate(model, tokenizer, pairs, methods=("GIM",), **{argument: value})


@pytest.mark.parametrize("resume", [3, [b"path"]])
def test_a_file_of_circuits_that_is_no_path_is_named(resume: Any) -> None:
    model, tokenizer = gim.demo.load()
    fact = "The password of Irene is {}. The password of Irene is"
    pairs = [gim.circuits.Pair(fact.format("lantern"), fact.format("copper"), " lantern", " copper")]
    with pytest.raises(TypeError, match="^resume must be a path"):
        gim.circuits.attribute(model, pairs, tokenizer=tokenizer, resume=resume)
