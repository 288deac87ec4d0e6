"""Half precision and quantised weights: every rule still acts, and errs as eager PyTorch does in the same types."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal

import pytest
import torch
from torch import nn

import gim
from gim import scoring
from gim_kernels.budget import relative_error
from tests import eager
from tests.families import ids, make
from tests.first import first
from tests.oracle import FLOAT64_PLAN_RELATIVE, assert_close64, assert_within_budget

BASELINE, TARGET = 3, 11
ALONE = ("TSG_ONLY", "FREEZE_ONLY", "SCALES_ONLY", "TRANSFORMER_LRP", "GIM_CONSTANT", "ATTNLRP", "GIM")


def explain(model: Any, tokens: torch.Tensor, preset: str) -> torch.Tensor:
    return gim.explain(model, tokens, baseline_token_id=BASELINE, target_token_id=TARGET, rules=preset)


def truth(model: Any, tokens: torch.Tensor, preset: str, dtype: torch.dtype) -> torch.Tensor:
    rules = eager.PRESETS[preset]
    return eager.attribution(model, tokens, rules, baseline=BASELINE, target=TARGET, dtype=dtype)[0]


def assert_every_rule_acts(model: Any, tokens: torch.Tensor, rounding: float) -> None:
    """Each preset's result differs from the ordinary gradient by more than rounding explains."""
    plain = explain(model, tokens, "GRADIENT")
    for preset in ALONE:
        assert relative_error(explain(model, tokens, preset), plain) > rounding, preset


@pytest.mark.parametrize(
    ("preset", "family", "dtype"),
    first(
        itertools.product(eager.PRESETS, ("llama", "qwen3"), (torch.bfloat16, torch.float16)),
        {("GIM", "qwen3", torch.bfloat16)},
    ),
    ids=str,
)
def test_half_precision_errs_at_most_twice_as_much_as_eager(preset: str, family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    tokens = ids(64)  # the largest error of few prompts is one draw of a wide distribution
    got = explain(model, tokens, preset)
    assert got.dtype == torch.float32  # scores are summed in float32 whatever the model's dtype is
    want = truth(copy.deepcopy(model).double(), tokens, preset, torch.float64)
    yardstick = truth(model, tokens, preset, dtype)
    assert_within_budget(got, want, yardstick.float(), f"{family} {preset}")


@pytest.mark.parametrize("exponent", [-14, 14])
def test_gradients_outside_float16_lose_nothing(exponent: int) -> None:
    """The last norm and the target's row of the head times powers of two: so are all attributions, and nothing else."""
    model, tokens = make("llama", torch.float16), ids(64)
    want = truth(copy.deepcopy(model).double(), tokens, "GIM", torch.float64)
    yardstick = truth(model, tokens, "GIM", torch.float16).float()
    with torch.no_grad():
        half = exponent // 2
        model.model.norm.weight *= 2.0**half
        model.lm_head.weight[TARGET] *= 2.0 ** (exponent - half)
    got = explain(model, tokens, "GIM") * 2.0**-exponent
    assert_within_budget(got, want, yardstick, f"gradients times 2^{exponent}")


@pytest.mark.parametrize("dtype", first((torch.bfloat16, torch.float16), (torch.bfloat16,)), ids=str)
def test_every_rule_acts_in_half_precision(dtype: torch.dtype) -> None:
    assert_every_rule_acts(make("llama", dtype), ids(4), 0.1)


def test_scores_are_summed_in_float32() -> None:
    """A row whose terms cancel: summed in bfloat16 nothing of the result would be left."""
    model = make("llama", torch.bfloat16)
    tokens = ids(1)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with gim.GIM(model):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    (grad,) = torch.autograd.grad(logits[0, -1, TARGET].float(), embedded)
    difference = embedded.detach() - model.get_input_embeddings()(torch.tensor([[BASELINE]])).detach()
    in_half = (difference * grad).sum(-1)
    want = (
        (embedded.double() - model.get_input_embeddings()(torch.tensor([[BASELINE]])).double()) * grad.double()
    ).sum(-1)
    got = explain(model, tokens, "GIM")
    assert relative_error(got, want[0]) < 1e-5 < relative_error(in_half, want)


def quantised(model: Any, config: Any) -> tuple[Any, Any]:
    """The model with quantised linear weights, and one whose float weights are what those stand for."""
    from torchao.quantization import quantize_

    plain = copy.deepcopy(model)
    quantize_(model, config)
    count = 0
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(ours, nn.Linear) and type(ours.weight) is not nn.Parameter:
            theirs.weight = nn.Parameter(ours.weight.dequantize().to(theirs.weight.dtype))
            count += 1
    assert count == 7 * model.config.num_hidden_layers + 1
    return model, plain


def torchao_config(bits: int) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra quantisation")
    if bits == 8:
        return quantization.Int8WeightOnlyConfig()
    granularity = pytest.importorskip("torchao.quantization.granularity").PerGroup(16)
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, "int4"),  # noqa: B009 (absent from the stubs)
        granularity=granularity,
    )


@pytest.mark.parametrize(
    ("preset", "bits"),
    first(
        itertools.product(eager.PRESETS, (8, 4)),
        lambda preset, bits: preset == "GIM" or (preset, bits) == ("ATTNLRP", 8),
    ),
)
def test_torchao_weights_give_what_the_dequantised_model_gives(preset: str, bits: int) -> None:
    model, plain = quantised(make("llama", torch.float32), torchao_config(bits))
    tokens = ids(16)
    with gim.GIM(model) as report:
        model(tokens)
    assert report.complete and report.counts() == {"attention": (3, 3), "norm": (7, 7), "gated_mlp": (3, 3)}
    want = truth(copy.deepcopy(plain).double(), tokens, preset, torch.float64)
    yardstick = truth(plain, tokens, preset, torch.float32)
    assert_within_budget(explain(model, tokens, preset), want, yardstick, f"{bits} bits, {preset}")


@pytest.mark.parametrize(
    ("bits", "dtype"),
    first(itertools.product((8, 4), (torch.float32, torch.bfloat16)), {(4, torch.bfloat16)}),
    ids=str,
)
def test_every_rule_acts_on_quantised_models(bits: int, dtype: torch.dtype) -> None:
    """In bfloat16 the dequantised weights are rounded themselves, so no float model is the truth for the scores."""
    model, _ = quantised(make("llama", dtype), torchao_config(bits))
    assert_every_rule_acts(model, ids(4), 0.1)


PLANS = ("auto", "none", "mlp", "mlp+tile=8", "layer", "layer+attention", "layer+attention+offload+tile=8")
SOME = ("auto", "mlp+tile=8", "layer+attention+offload+tile=8")
by_plans = pytest.mark.parametrize(
    "plans", [pytest.param(SOME, id="some"), pytest.param(PLANS, id="all", marks=pytest.mark.slow)]
)
by_held = pytest.mark.parametrize("held", first(("buffers", "parameters"), ("parameters",)))


class Int8(nn.Module):
    """A linear layer of int8 numbers, held as a buffer or a parameter, with float32 scales for each output.

    Args:
        linear: what it stands for, rounded; without a bias.
        held: where its numbers and scales are.
        takes: the only dtype that it takes; None for any.
        outliers: where numbers at any token are larger, their columns are taken from unrounded inputs at every token.
    """

    def __init__(self, linear: nn.Linear, held: str, takes: torch.dtype | None, outliers: float | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.takes, self.outliers = takes, outliers
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        numbers = (linear.weight.detach().float() / scale).round().to(torch.int8)
        if held == "buffers":
            self.register_buffer("numbers", numbers)
            self.register_buffer("scale", scale)
        else:
            self.numbers = nn.Parameter(numbers, requires_grad=False)
            self.scale = nn.Parameter(scale, requires_grad=False)

    def dequantised(self) -> torch.Tensor:
        return self.numbers * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.takes is not None and x.dtype != self.takes:
            raise TypeError(f"takes {self.takes}, got {x.dtype}")
        if self.outliers is not None:
            # Straight through: the derivative is the weight's, as int8 products give it.
            step = x.detach().abs().amax(-1, keepdim=True) / 127
            rounded = (x.detach() / step).round() * step
            apart = (x.detach().abs() >= self.outliers).flatten(0, -2).any(0)
            x = x + torch.where(apart, 0.0, rounded - x.detach())
        return nn.functional.linear(x, self.dequantised().to(x.dtype))


def with_int8(
    model: Any, held: str, takes: torch.dtype | None = None, outliers: float | None = None
) -> tuple[Any, Any]:
    """The model with every linear layer of int8, and one whose float weights are what those stand for."""
    plain = copy.deepcopy(model)
    for ours, theirs in zip(list(model.modules()), list(plain.modules()), strict=True):
        for name, layer in list(ours.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                new = Int8(layer, held, takes, outliers)
                setattr(ours, name, new)
                getattr(theirs, name).weight = nn.Parameter(new.dequantised().to(layer.weight.dtype))
    return model, plain


@by_plans
@pytest.mark.parametrize("held", first(("buffers", "parameters"), ("buffers",)))
def test_int8_weights_are_right_under_every_plan(held: str, plans: tuple[str, ...]) -> None:
    """Weights that are no floating parameters, or no parameters at all: the rules and the plans act all the same."""
    model, plain = with_int8(make("llama", torch.float32), held)
    tokens = ids(16)
    with gim.GIM(model) as report:
        model(tokens)
    assert report.complete and report.counts() == {"attention": (3, 3), "norm": (7, 7), "gated_mlp": (3, 3)}
    want = truth(copy.deepcopy(plain).double(), tokens, "GIM", torch.float64)
    yardstick = truth(plain, tokens, "GIM", torch.float32)
    for memory in plans:
        got = gim.explain(model, tokens, target_token_id=TARGET, baseline_token_id=BASELINE, memory=memory)
        assert_within_budget(got, want, yardstick, f"{held}, {memory}")


@by_plans
@by_held
def test_int8_layers_take_the_hidden_states_dtype_and_not_their_scales(held: str, plans: tuple[str, ...]) -> None:
    model, plain = with_int8(make("llama", torch.bfloat16), held, takes=torch.bfloat16)
    tokens = ids(64)
    with gim.GIM(model) as report:
        model(tokens)
    assert report.complete and report.counts()["gated_mlp"] == (3, 3)
    want = truth(copy.deepcopy(plain).double(), tokens, "GIM", torch.float64)
    yardstick = truth(plain, tokens, "GIM", torch.bfloat16).float()
    for memory in plans:
        got = gim.explain(model, tokens, target_token_id=TARGET, baseline_token_id=BASELINE, memory=memory)
        assert_within_budget(got, want, yardstick, f"{held}, {memory}")


@by_plans
@by_held
def test_an_mlp_whose_outliers_reach_other_tokens_runs_whole(held: str, plans: tuple[str, ...]) -> None:
    """Parts of its tokens would round otherwise than all of them, so every plan runs it on all."""
    float_model = make("llama", torch.float64)
    for layer in float_model.model.layers:
        layer.post_attention_layernorm.weight.data *= 8.0
    model, _ = with_int8(float_model, held, outliers=12.0)
    tokens = ids(2)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with gim.GIM(model):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    (grad,) = torch.autograd.grad(logits[:, -1, TARGET].sum(), embedded)
    baseline = model.get_input_embeddings()(torch.tensor([[BASELINE]])).detach()
    want = ((embedded.detach() - baseline) * grad).sum(-1)
    for memory in plans:
        got = gim.explain(model, tokens, target_token_id=TARGET, baseline_token_id=BASELINE, memory=memory)
        assert_close64(got, want, memory, FLOAT64_PLAN_RELATIVE)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_weights_give_what_the_dequantised_model_gives(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes, which is in no extra: 125 MB")
    model = make("llama", torch.float32)
    plain = copy.deepcopy(model)
    for ours, theirs in zip(list(model.modules()), list(plain.modules()), strict=True):
        for name, layer in list(ours.named_children()):
            if not isinstance(layer, nn.Linear) or name == "lm_head":
                continue
            weight = layer.weight.detach()
            if bits == 4:
                new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
                new = new.to("cpu")
                if new.weight.quant_state is None:
                    new.weight = new.weight._quantize("cpu")
                stands_for = bnb.functional.dequantize_4bit(new.weight.data, new.weight.quant_state)
            else:
                new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
                stands_for = (
                    new.weight.CB.float() * new.weight.SCB[:, None] / 127 if new.weight.CB is not None else weight
                )
            setattr(ours, name, new)
            getattr(theirs, name).weight = nn.Parameter(stands_for)
    assert_every_rule_acts(model, ids(4), 0.1)
    tokens = ids(16)
    for preset in eager.PRESETS:
        want = truth(copy.deepcopy(plain).double(), tokens, preset, torch.float64)
        yardstick = truth(plain, tokens, preset, torch.float32)
        assert_within_budget(explain(model, tokens, preset), want, yardstick, f"{bits} bits, {preset}")
    want = truth(copy.deepcopy(plain).double(), tokens, "GIM", torch.float64)
    yardstick = truth(plain, tokens, "GIM", torch.float32)
    for memory in PLANS:
        got = gim.explain(model, tokens, target_token_id=TARGET, baseline_token_id=BASELINE, memory=memory)
        assert_within_budget(got, want, yardstick, f"{bits} bits, {memory}")


@pytest.mark.parametrize("measure", ["logprob", "logodds"])
def test_a_nearly_certain_token_is_explained_to_the_last_digits(measure: Literal["logprob", "logodds"]) -> None:
    """Where the probability is 1 - 1e-4, the gradient of the log-probability is small beside that of the logit."""
    logits = torch.randn(1, 1, 200_000, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 7] = logits.logsumexp(-1).item() + 9
    wanted = torch.tensor([[7]])

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(scoring._measured(x, wanted, measure).sum(), x)
        return found

    x = logits.double().requires_grad_()
    told = x.log_softmax(-1)[0, 0, 7]
    (want,) = torch.autograd.grad(told if measure == "logprob" else told - (-told.expm1()).log(), x)
    got = gradient(logits).double()
    assert float((got - want).norm() / want.norm()) < 1e-6
