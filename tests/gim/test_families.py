"""Every family against the rules applied to the model's own code, which shares nothing with the package."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

import gim
from gim.context import inspect
from gim.intercept.attention import gim_attention
from gim.intercept.masks import KeyPattern, key_pattern
from gim.intercept.session import Session, Stack
from gim.intercept.watch import PART_OF, Watch
from gim_kernels.budget import relative_error
from tests import eager, model_code
from tests.families import ENCODERS, FAMILIES, KINDS, SHARED, ids, make
from tests.first import first
from tests.model_code import Wide, attend
from tests.oracle import (
    FLOAT32_NORMS_RELATIVE,
    FLOAT64_MODEL_RELATIVE,
    assert_agree,
    assert_close64,
    assert_within_budget,
)

BASELINE = 3
ALL = {**FAMILIES, **ENCODERS}
#: Families whose forward :mod:`tests.eager` writes out itself.
WRITTEN_OUT = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral"]
#: Five different factors and another temperature: no two can be swapped unseen.
OWN: dict[str, Any] = {"q_scale": 0.1, "k_scale": 0.7, "v_scale": 0.3, "gate_scale": 0.4, "up_scale": 0.9}
OWN_RULES = eager.EagerRules(temperature=3.0, qkv=(0.1, 0.7, 0.3), gate_up=(0.4, 0.9))


def target_of(family: str) -> int | None:
    return 2 if family == "bert-classifier" else None


def padding(side: str | None, tokens: torch.Tensor) -> torch.Tensor | None:
    if side is None:
        return None
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    return mask


@pytest.mark.parametrize("family", first(WRITTEN_OUT, ("qwen2-window", "qwen3")))
def test_the_two_independent_implementations_agree(family: str) -> None:
    """So that what a family is held against is not wrong itself, and GIM not right by the same error."""
    model, tokens = make(family), ids()
    cases = [(name, None) for name in eager.PRESETS] + [("GIM", "left"), ("GIM", "right")]
    for preset, side in cases:
        rules, mask = eager.PRESETS[preset], padding(side, tokens)
        one, gradient = model_code.attribution(model, tokens, rules, ALL[family].products, baseline=BASELINE, mask=mask)
        other, other_gradient = eager.attribution(model, tokens, rules, baseline=BASELINE, mask=mask)
        # Rotations are float32 in the one that is written out.
        assert_agree(one, other, f"{family} {preset} {side}")
        assert_agree(gradient, other_gradient, f"{family} {preset} {side}")


@pytest.mark.parametrize(
    ("family", "preset"),
    first(
        itertools.product(ALL, eager.PRESETS),
        lambda family, preset: (
            preset == "GIM" or family == "llama" or (family in KINDS and preset in ("GIM_CONSTANT", "ATTNLRP"))
        ),
    ),
)
def test_every_preset_equals_the_rules_on_the_models_own_code(family: str, preset: str) -> None:
    model, tokens = make(family), ids()
    with Wide():
        got = gim.explain(model, tokens, baseline_token_id=BASELINE, rules=preset, target_token_id=target_of(family))
    want, _ = model_code.attribution(
        model, tokens, eager.PRESETS[preset], ALL[family].products, baseline=BASELINE, target=target_of(family)
    )
    assert_close64(got, want, f"{family} {preset}", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize(
    ("family", "side"),
    first(
        itertools.product(ALL, ("left", "right")),
        lambda family, side: (
            family in KINDS or (side == "left" and family in (*ENCODERS, "gemma3", "gpt-oss", "falcon"))
        ),
    ),
)
def test_padded_batches_and_rules_of_ones_own_equal_it_too(family: str, side: str) -> None:
    model, tokens = make(family), ids()
    mask = padding(side, tokens)
    with Wide():
        got = gim.explain(
            model, tokens, baseline_token_id=BASELINE, softmax_temperature=3.0, attention_mask=mask, **OWN,
            target_token_id=target_of(family),
        )  # fmt: skip
    assert mask is not None
    want = torch.zeros_like(got)
    for row, exists in enumerate(mask.bool()):
        # The row alone, so that the truth knows nothing of padding.
        alone = tokens[row, exists][None]
        want[row, exists] = model_code.attribution(
            model, alone, OWN_RULES, ALL[family].products, baseline=BASELINE, target=target_of(family)
        )[0][0]
    assert_close64(got, want, f"{family} {side}", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("preset", first(("GIM", "GIM_CONSTANT", "ATTNLRP"), ("GIM",)))
@pytest.mark.parametrize("family", first(ALL, ("llama", "gemma3", "bert")))
def test_float32_errs_at_most_twice_as_much_as_the_models_own_code(family: str, preset: str) -> None:
    double, tokens = make(family), ids(16)
    single = copy.deepcopy(double).float()
    target = target_of(family) or 11
    rules, products = eager.PRESETS[preset], ALL[family].products
    got = gim.explain(single, tokens, baseline_token_id=BASELINE, rules=preset, target_token_id=target % 5)
    truth, _ = model_code.attribution(double, tokens, rules, products, baseline=BASELINE, target=target % 5)
    yardstick, _ = model_code.attribution(single, tokens, rules, products, baseline=BASELINE, target=target % 5)
    assert_within_budget(got, truth, yardstick, f"{family} {preset}")


@pytest.mark.parametrize("family", ALL)
def test_nothing_that_a_rule_should_act_on_runs_outside_the_kernels(family: str) -> None:
    model, tokens = make(family, torch.float32), ids(1)
    with gim.GIM(model) as report, Watch(dict(model.named_modules())) as inside:
        model(tokens)
    assert report.watched and not inside.found
    with Watch(
        dict(model.named_modules())
    ) as watch:  # and without a context, it sees what the report counts, call for call
        model(tokens)
    seen = dict.fromkeys(PART_OF.values(), 0)
    for found in watch.found:
        seen[PART_OF[found.kind]] += 1
    assert seen == {part: calls for part, (_, calls) in report.counts().items()}


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_counted_and_undone(family: str) -> None:
    model, row = make(family), ENCODERS[family]
    layers = model.config.num_hidden_layers
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with gim.GIM(model) as report:
        model(ids())
    norms = row.norms * layers + row.other_norms - (family == "modernbert")  # its first layer has one norm less
    counts = {"attention": layers, "norm": norms, "gated_mlp": layers if row.gated is None else row.gated}
    assert report.counts() == {part: (count, count) for part, count in counts.items()}
    assert {a.module for a in report.of("attention")} == {f"{row.layers}.{i}.{row.attention}" for i in range(layers)}
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items() if not isinstance(value, bool))


@pytest.mark.parametrize("family", ENCODERS)
def test_the_forward_of_encoders_ignores_the_rules_and_is_their_own(family: str) -> None:
    model, tokens = make(family, torch.float32), ids()
    mask = padding("right", tokens)
    with torch.no_grad():
        own = model(tokens, attention_mask=mask).logits
        with Wide():
            truth = copy.deepcopy(model).double()(tokens, attention_mask=mask).logits
        inside = []
        for preset in gim.rules.PRESETS:
            with gim.GIM(model, rules=preset):
                inside.append(model(tokens, attention_mask=mask).logits)
    assert all(torch.equal(inside[0], other) for other in inside[1:])
    exists = slice(None) if own.dim() == 2 else mask.bool()
    assert_within_budget(inside[0][exists], truth[exists], own[exists], family)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_rule_alone_changes_the_gradient_of_encoders(family: str) -> None:
    model, tokens = make(family), ids(1)
    off: dict[str, Any] = {"freeze_norm": False, "softmax_temperature": None, **dict.fromkeys(OWN)}

    def explain(**changed: Any) -> torch.Tensor:
        arguments = {**off, **changed}
        # A classifier's one row of logits is of the prompt, and no position's.
        arguments["target_position"] = -1 if "classifier" in family else 5
        return gim.explain(model, tokens, baseline_token_id=BASELINE, target_token_id=1, **arguments)

    base = explain()
    for name, value in {"freeze_norm": True, "softmax_temperature": 2.0, **OWN}.items():
        changes = relative_error(explain(**{name: value}), base) > 1e-3
        acts = ENCODERS[family].gated != 0 or name not in ("gate_scale", "up_scale")
        assert changes == acts, name


@pytest.mark.parametrize("family", first(("mixtral", "qwen3-moe", "gpt-oss"), ("qwen3-moe", "gpt-oss")))
def test_experts_in_their_own_loop_and_grouped_are_the_same_as_batched(family: str) -> None:
    model, tokens = make(family, torch.float32), ids()
    found = []
    for implementation in ("batched_mm", "grouped_mm", "eager"):
        model.config._experts_implementation = implementation
        with gim.GIM(model) as report:
            model(tokens)
        assert report.counts()["gated_mlp"] == (3, 3), (family, implementation)
        found.append(gim.explain(model, tokens, baseline_token_id=BASELINE))
    plain = gim.explain(model, tokens, baseline_token_id=BASELINE, gate_scale=None, up_scale=None)
    assert_within_budget(found[1], found[0].double(), found[2], family)
    assert relative_error(plain, found[0]) > 1e-2


def test_a_routers_softmax_stays_exact() -> None:
    """The gradient through a router: temperature and constant rules must not touch it."""
    model, tokens = make("mixtral"), ids(1)
    router = model.model.layers[1].mlp.gate
    slopes = []
    for rules in ("GRADIENT", "GIM_CONSTANT"):
        outputs: list[torch.Tensor] = []
        handle = router.register_forward_hook(
            lambda _, inputs, out, outputs=outputs: outputs.extend([inputs[0], out[1]])
        )
        with gim.GIM(model, rules=rules):
            model(tokens, use_cache=False)
        handle.remove()
        x, weights = outputs
        (slope,) = torch.autograd.grad(weights.pow(2).sum(), x)
        slopes.append(slope)
    assert float(slopes[0].norm()) > 0
    assert torch.equal(slopes[0], slopes[1])


# Masks


def dense(pattern: KeyPattern) -> torch.Tensor:
    """True where query i sees key j, [T, S], read off the definition of each field."""
    query = torch.arange(pattern.queries)[:, None] + pattern.keys - pattern.queries
    key = torch.arange(pattern.keys)[None]
    seen = torch.ones(pattern.queries, pattern.keys, dtype=torch.bool)
    if pattern.causal:
        seen &= key <= query
    if pattern.window is not None:
        seen &= key > query - pattern.window
    if pattern.reach is not None:
        seen &= (key - query).abs() <= pattern.reach
    if pattern.documents is not None:
        starts = torch.tensor(pattern.documents[0])
        seen &= torch.bucketize(key, starts, right=True) == torch.bucketize(query, starts, right=True)
    return seen


@pytest.mark.parametrize("documents", [None, ((0, 7, 8, 20),)], ids=["whole", "packed"])
@pytest.mark.parametrize("shape", ["causal", "window", "reach", "both"])
@pytest.mark.parametrize("rule", ["temperature", "constant", "exact"])
def test_patterns_equal_dense_masks(shape: str, documents: Any, rule: str) -> None:
    size = 29
    torch.manual_seed(0)
    q, k, v, w = (torch.randn(2, heads, size, 16, dtype=torch.float64) for heads in (4, 2, 2, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    pattern = KeyPattern(
        size, size, shape in ("causal", "window"), 5 if shape == "window" else None, None,
        3 if shape == "reach" else None, documents,
    )  # fmt: skip
    module = nn.Module()
    rules = eager.EagerRules(
        temperature=2.0 if rule == "temperature" else None, constant_softmax=rule == "constant", qkv=(0.1, 0.7, 0.3)
    )
    want = attend(q, k, v, ~dense(pattern), 0.25, rules)
    expected = torch.autograd.grad((want * w).sum(), inputs, allow_unused=True)
    own = gim.rules.Rules(
        **{**gim.rules.GIM.to_dict(), "softmax": rule, "q_scale": 0.1, "k_scale": 0.7, "v_scale": 0.3}
    )
    session = Session(own, True, Stack(module))
    got, _ = session.inside("", module, lambda _: gim_attention(module, q, k, v, pattern, scaling=0.25))
    assert_close64(got.transpose(1, 2), want, "out")
    given = torch.autograd.grad((got.transpose(1, 2) * w).sum(), inputs, allow_unused=True)
    for name, one, other in zip("qkv", given, expected, strict=True):
        one = torch.zeros_like(q if name == "q" else k) if one is None else one
        other = torch.zeros_like(one) if other is None else other
        assert_close64(one, other, name, relative=FLOAT64_MODEL_RELATIVE)


def test_packed_documents_equal_each_alone() -> None:
    for family in ("qwen2-window", "gemma3"):
        model = make(family)
        rows = [ids(1, length, seed=length)[0] for length in (9, 17, 1, 6)]
        tokens = torch.cat(rows)
        places = torch.cat([torch.arange(len(row)) for row in rows])
        with Wide():
            got = gim.explain(model, tokens, baseline_token_id=BASELINE, position_ids=places, target_position=25)
            alone = gim.explain(model, rows[1], baseline_token_id=BASELINE)
        want = torch.zeros_like(got)
        want[9:26] = alone
        assert_close64(got, want, family, relative=FLOAT64_MODEL_RELATIVE)


def test_packed_documents_by_their_lengths_equal_those_by_positions() -> None:
    model, tokens = make("llama"), ids(1, 30)
    places = torch.cat([torch.arange(11), torch.arange(19)])[None]
    lengths = torch.tensor([0, 11, 30], dtype=torch.int32)
    with gim.GIM(model):
        want = model(tokens, position_ids=places, use_cache=False).logits
        got = model(
            tokens, position_ids=places, use_cache=False, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths,
            max_length_q=19, max_length_k=19,
        ).logits  # fmt: skip
        assert torch.equal(got, want)
        with pytest.raises(gim.UnsupportedModelError, match=r"layers\.0\.self_attn: cu_seq_lens_q says that documents"):
            model(tokens, position_ids=places, use_cache=False, cu_seq_lens_q=torch.tensor([0, 12, 30]))
        with pytest.raises(gim.UnsupportedModelError, match="cu_seq_lens_q must start at 0 and end at 30"):
            model(tokens, use_cache=False, cu_seq_lens_q=torch.tensor([0, 12]))


def test_chunked_attention_is_documents() -> None:
    model = make_llama4()
    tokens = ids(2)
    for side in (None, "left"):
        mask = padding(side, tokens)
        with Wide():
            got = gim.explain(model, tokens, baseline_token_id=BASELINE, attention_mask=mask)
        want, _ = model_code.attribution(
            model, tokens, eager.PRESETS["GIM"],
            {"Llama4TextExperts": "experts_llama4", "Llama4TextMLP": "separate_activation_fn"},
            baseline=BASELINE, mask=mask,
        )  # fmt: skip
        assert_close64(got, want, str(side), relative=FLOAT64_MODEL_RELATIVE)


def make_llama4() -> Any:
    torch.manual_seed(0)
    config = hf.Llama4TextConfig(
        **{**SHARED, "num_hidden_layers": 2}, head_dim=12, attention_chunk_size=8, num_local_experts=4,
        num_experts_per_tok=1, intermediate_size_mlp=80, pad_token_id=0, interleave_moe_layer_step=2,
        no_rope_layers=[1, 0],
    )  # fmt: skip
    return hf.Llama4ForCausalLM(config).double().eval()


def test_keys_and_values_of_different_sizes() -> None:
    """Latent attention, as DeepSeek's."""
    torch.manual_seed(0)
    config = hf.DeepseekV3Config(
        **{**SHARED, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=12,
        n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=24,
        first_k_dense_replace=1, experts_implementation="batched_mm",
    )  # fmt: skip
    model = hf.DeepseekV3ForCausalLM(config).double().eval()
    products = {"DeepseekV3MLP": "separate", "DeepseekV3Experts": "experts"}
    with Wide():
        got = gim.explain(model, ids(), baseline_token_id=BASELINE)
    want, _ = model_code.attribution(model, ids(), eager.PRESETS["GIM"], products, baseline=BASELINE)
    assert_close64(got, want, "deepseek_v3", relative=FLOAT64_MODEL_RELATIVE)


def test_a_masked_token_is_explained_where_it_stands() -> None:
    model, tokens = make("modernbert"), ids(2)
    with Wide():
        got = gim.explain(model, tokens, baseline_token_id=BASELINE, target_position=11, target_token_id=5)
    want, _ = model_code.attribution(
        model, tokens, eager.PRESETS["GIM"], ENCODERS["modernbert"].products, baseline=BASELINE, target=5, position=11
    )
    assert_close64(got, want, "modernbert", relative=FLOAT64_MODEL_RELATIVE)
    assert bool((got[:, 12:].abs() > 0).any())  # it sees what follows


def test_a_class_is_checked() -> None:
    with pytest.raises(ValueError, match=r"target_token_id must be a class in 0\.\.4, got 5"):
        gim.explain(make("bert-classifier"), ids(), baseline_token_id=BASELINE, target_token_id=5)


# Gated MLPs of other layouts


class Mixed(nn.Module):
    """A gated MLP of no known layout: one projection, interleaved, with the product written the other way round."""

    def __init__(self, width: int, activation: Any) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * width)
        self.back = nn.Linear(width, width)
        self.act = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(x)[..., ::2], self.both(x)[..., 1::2]
        return self.back(up * self.act(gate))


class Functional(nn.Module):
    """A gated MLP that calls its activation as a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(width, 64), nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def _bounded(activation: nn.Module) -> bool:
    return isinstance(activation, nn.SiLU | nn.Hardtanh)


def put(model: Any, mlp: nn.Module) -> Any:
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = copy.deepcopy(mlp)
    return model


@pytest.mark.parametrize("rules", ["GIM", "ATTNLRP"])
@pytest.mark.parametrize(
    "activation", first((nn.SiLU(), nn.Hardtanh(), nn.Sigmoid(), nn.Softplus()), _bounded), ids=str
)
def test_any_layout_and_any_activation(activation: nn.Module, rules: str) -> None:
    model = put(make("llama"), Mixed(48, activation)).double()

    def mixed(module: Any, x: torch.Tensor) -> torch.Tensor:
        wanted = eager.PRESETS[rules]
        gate, up = module.both(x)[..., ::2], module.both(x)[..., 1::2]
        return module.back(model_code.activated(gate, module.act, wanted) * eager.scale(up, wanted.gate_up[1]))

    with pytest.MonkeyPatch.context() as patch, Wide():
        patch.setitem(model_code.PRODUCTS, "mixed", ("forward", mixed))
        got = gim.explain(model, ids(), baseline_token_id=BASELINE, rules=rules)
        want, _ = model_code.attribution(model, ids(), eager.PRESETS[rules], {"Mixed": "mixed"}, baseline=BASELINE)
    assert_close64(got, want, str(activation), relative=FLOAT64_MODEL_RELATIVE)
    assert inspect(model).counts()["gated_mlp"][0] == 3


def test_an_activation_called_as_a_function() -> None:
    model = put(make("llama"), Functional(48)).double()
    report = inspect(model)
    assert [a.recognised for a in report.of("gated_mlp")] == ["silu(gate) * up"] * 3
    plain = gim.explain(model, ids(), baseline_token_id=BASELINE, gate_scale=None, up_scale=None)
    got = gim.explain(model, ids(), baseline_token_id=BASELINE)

    def functional(module: Any, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(eager.scale(module.w1(x), 0.5))
        return module.w2(gate * eager.scale(module.w3(x), 0.5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_code.PRODUCTS, "functional", ("forward", functional))
        products = {"Functional": "functional"}
        want, _ = model_code.attribution(model, ids(), eager.PRESETS["GIM"], products, baseline=BASELINE)
    assert relative_error(got, plain) > 1e-3
    with Wide():
        got = gim.explain(model, ids(), baseline_token_id=BASELINE)
    assert_close64(got, want, "functional", relative=FLOAT64_MODEL_RELATIVE)


def test_an_activation_that_is_never_multiplied_is_left_alone() -> None:
    for family in ("gpt2", "bert"):
        report = inspect(make(family))
        assert report.of("gated_mlp") == [] and report.complete


def test_key_pattern_finds_windows_on_both_sides() -> None:
    pattern = key_pattern(
        2, 20, 20, local_size=4, mask_function=lambda b, h, q, k: (q - k).abs() <= 4, attention_mask=None
    )
    assert (pattern.causal, pattern.window, pattern.reach, pattern.documents) == (False, None, 4, None)
    starts = torch.tensor([0] * 5 + [1] * 8 + [2] * 7)
    pattern = key_pattern(
        2, 20, 20, local_size=4, mask_function=lambda b, h, q, k: ((q - k).abs() <= 4) & (starts[q] == starts[k])
    )
    assert (pattern.reach, pattern.documents) == (4, ((0, 5, 13),))


def test_the_interface_of_the_tests_is_not_the_packages() -> None:
    assert AttentionInterface()["tests"] is not gim_attention


@pytest.mark.parametrize(
    ("family", "filled"),
    first(
        itertools.product(("llama", "gemma2", "gemma3", "mistral"), (1, 9, 14)),
        lambda family, filled: family == "gemma3" or filled == 9,
    ),
)
def test_one_query_sees_nothing_of_the_empty_slots_of_a_static_cache(family: str, filled: int) -> None:
    import transformers

    model = make(family, torch.float64)
    tokens = torch.randint(4, 90, (2, filled + 1), generator=torch.Generator().manual_seed(0))

    def after(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(tokens[:, :filled], past_key_values=cache, use_cache=True)
        with gim.GIM(model):
            return model(tokens[:, filled:], past_key_values=cache, use_cache=True).logits

    static = after(transformers.StaticCache(config=model.config, max_cache_len=20))
    dynamic = after(transformers.DynamicCache(config=model.config))
    assert_close64(static, dynamic, family, relative=FLOAT32_NORMS_RELATIVE)


@pytest.mark.parametrize("length", [3, 11])
def test_an_encoder_may_be_longer_or_shorter_than_its_decoder(length: int) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "vocab_size": 40,
        "max_position_embeddings": 32,
    }
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).double().eval()
    given = {"input_ids": torch.arange(4, 4 + length)[None], "decoder_input_ids": torch.arange(4, 11)[None]}
    own = model(**given).logits
    with gim.GIM(model) as report:
        ours = model(**given).logits
    assert report.counts()["attention"] == (3, 3)
    assert_close64(ours, own, "logits")
