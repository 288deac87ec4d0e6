"""TransformerLens: the same gradients as the Hugging Face model of the same weights, with every hook point alive."""

from __future__ import annotations

import copy
import itertools
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import gim
import gim.demo
from gim.applied import UnsupportedModelError
from tests import eager
from tests.families import SHARED, ids, make
from tests.first import first
from tests.hooks import ordinary
from tests.oracle import assert_agree

transformer_lens = pytest.importorskip("transformer_lens", reason="needs the extra transformer-lens")
HAS_HOOKED_TRANSFORMER = (
    int(transformer_lens.__version__.split(".")[0]) < 4
    if hasattr(transformer_lens, "__version__")
    else "HookedTransformer" in vars(transformer_lens)
)

BASELINE = 3
LAYERS = SHARED["num_hidden_layers"]


def bridge(model: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    # A tokenizer is asked for although ids are all that is given.
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=copy.deepcopy(model), tokenizer=gim.demo.load()[1], device="cpu"
    ).eval()


def hooked(model: Any, *, fold: bool = False) -> Any:
    """A HookedTransformer with the weights of a Llama or Qwen3."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights, convert_qwen3_weights

    config = model.config
    norms = type(model).__name__.startswith("Qwen3")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=64,
        d_head=size,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=size,
        rotary_base=int(config.rope_parameters["rope_theta"]),
        rotary_adjacent_pairs=False,
        eps=config.rms_norm_eps,
        use_qk_norm=norms,
        original_architecture=type(model).__name__,
        dtype=next(model.parameters()).dtype,
        device="cpu",
    )
    lens = HookedTransformer(cfg)
    convert: Any = convert_qwen3_weights if norms else convert_llama_weights
    lens.load_and_process_state_dict(
        {name: value.clone() for name, value in convert(model, cfg).items()},
        fold_ln=fold,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return lens.eval()


KINDS = {
    "bridge": bridge,
    **({"hooked": hooked, "hooked-folded": lambda model: hooked(model, fold=True)} if HAS_HOOKED_TRANSFORMER else {}),
}


by_kind = pytest.mark.parametrize("kind", first(KINDS, [kind for kind in KINDS if kind != "hooked-folded"]))


def written_out(kind: str) -> str:
    """What the report says of attention that hooks can see."""
    name = "PositionEmbeddingsAttentionBridge" if kind == "bridge" else "GroupedQueryAttention"
    return (
        f"{name} writes its attention out: scores of T x S entries exist, as in the model's own code, and memory is "
        "O(T^2)"
    )


def lens_gradient(lens: Any, tokens: torch.Tensor, hooks: Any = (), **context: Any) -> tuple[torch.Tensor, Any]:
    """The gradient at the embeddings, by TransformerLens's own way to reach them."""
    leaves: list[torch.Tensor] = []

    def leaf(embedded: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(embedded.detach().requires_grad_(True))
        return leaves[-1]

    with gim.GIM(lens, **context) as report:
        logits = lens.run_with_hooks(tokens, fwd_hooks=[("hook_embed", leaf), *hooks])
        (grad,) = torch.autograd.grad(logits[:, -1].pow(2).sum(), leaves[0])
    return grad, report


def model_gradient(model: Any, tokens: torch.Tensor, rules: Any) -> torch.Tensor:
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with gim.GIM(model, rules=rules):
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    (grad,) = torch.autograd.grad(logits[:, -1].pow(2).sum(), embedded)
    return grad


@pytest.mark.parametrize("family", first(("llama", "qwen3"), ("llama",)))
@pytest.mark.parametrize(
    ("kind", "preset"),
    # The others are held to every preset in float64.
    first(itertools.product(KINDS, gim.rules.PRESETS), lambda kind, preset: kind == "bridge" or preset == "GIM"),
)
def test_gradients_agree_with_the_hugging_face_model(kind: str, family: str, preset: str) -> None:
    model = make(family, torch.float32)
    lens, tokens = KINDS[kind](model), ids(2, 17)
    got, report = lens_gradient(lens, tokens, rules=preset)
    assert_agree(got, model_gradient(model, tokens, preset), f"{kind} {family} {preset}")
    count = 4 if family == "qwen3" else 2
    # A HookedTransformer with grouped heads runs its first norm once for each of queries, keys and values.
    calls = count * LAYERS + 1 + (0 if kind == "bridge" else 2 * LAYERS)
    assert report.counts() == {
        "attention": (LAYERS, LAYERS),
        "norm": (count * LAYERS + 1, calls),
        "gated_mlp": (LAYERS, LAYERS),
    }
    assert report.complete and report.notes == [written_out(kind)] and report.forwards == 1


@pytest.mark.parametrize(
    ("kind", "preset"),
    first(
        itertools.product((kind for kind in KINDS if kind != "bridge"), eager.PRESETS),
        lambda kind, preset: (
            preset == "GIM" or (kind == "hooked" and preset in ("GIM_CONSTANT", "ATTNLRP", "GRADIENT"))
        ),
    ),
)
def test_float64_equals_the_independent_implementation(kind: str, preset: str) -> None:
    """A bridge computes its softmax in float32 whatever the model's dtype is, so it cannot be held to this."""
    model = make("llama")
    tokens = ids(2, 17)
    got = gim.explain(KINDS[kind](model), tokens, baseline_token_id=BASELINE, rules=preset)
    want, _ = eager.attribution(model, tokens, eager.PRESETS[preset], baseline=BASELINE)
    assert_agree(got, want, f"{kind} {preset}")


@by_kind
@pytest.mark.parametrize("memory", first(("none", "layer"), ("layer",)))
def test_explain_takes_models_of_transformer_lens(kind: str, memory: str) -> None:
    model, tokens = make("llama", torch.float32), ids(1, 17)[0]
    got = gim.explain(KINDS[kind](model), tokens, baseline_token_id=BASELINE, memory=memory)
    assert_agree(got, gim.explain(model, tokens, baseline_token_id=BASELINE), kind)


HOOKS = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern", "hook_z")


@by_kind
def test_an_answer_is_not_generated_from_what_is_no_prompt(kind: str) -> None:
    model, tokenizer = gim.demo.load()
    with pytest.raises(ValueError, match="generate needs a model that generates from input_ids, and .* does not: give"):
        gim.attribute(KINDS[kind](model), tokenizer, "The password of Irene is", generate=9)


@by_kind
def test_every_hook_point_works_and_sees_what_it_sees_outside(kind: str) -> None:
    lens, tokens = KINDS[kind](make("llama", torch.float32)), ids(1, 9)
    _, outside = lens.run_with_cache(tokens)
    with gim.GIM(lens):
        _, inside = lens.run_with_cache(tokens)
    assert set(inside.keys()) == set(outside.keys())
    for name in outside:
        assert_agree(inside[name], outside[name], name)
    with gim.GIM(lens):
        zeroed = lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x * 0)])
    own = lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x * 0)])
    assert_agree(zeroed, own, "ablated pattern")


@pytest.mark.parametrize(
    ("kind", "preset"),
    first(
        itertools.product(KINDS, ("GRADIENT", "GIM", "GIM_CONSTANT")),
        lambda kind, preset: kind == "bridge" or preset == "GIM",
    ),
)
def test_a_softmax_and_a_product_of_a_users_hook_are_left_alone(kind: str, preset: str) -> None:
    lens, tokens = KINDS[kind](make("llama", torch.float32)), ids(1, 9)

    def metric(scores: torch.Tensor) -> torch.Tensor:
        return scores + (torch.softmax(scores.nan_to_num(), -1) @ torch.softmax(scores.nan_to_num(), -1))

    name = "blocks.1.attn.hook_attn_scores"
    got, report = lens_gradient(lens, tokens, [(name, lambda x, hook: metric(x))], rules=preset)
    assert report.counts()["attention"] == (LAYERS, LAYERS)
    assert any(re.match(r"softmax over keys in a hook .*blocks\.1\..*hook_attn_scores$", note) for note in report.notes)
    want, _ = lens_gradient(lens, tokens, [(name, lambda x, hook: ordinary(metric)(x))], rules=preset)
    assert_agree(got, want, "gradient")
    if preset == "GRADIENT":
        embedded = lens.embed(tokens).detach().requires_grad_(True)
        hooks = [("hook_embed", lambda x, hook: embedded), (name, lambda x, hook: metric(x))]
        logits = lens.run_with_hooks(tokens, fwd_hooks=hooks)
        (want,) = torch.autograd.grad(logits[:, -1].pow(2).sum(), embedded)
        assert_agree(got, want, "gradient outside")


@by_kind
def test_no_gradient_reaches_the_scale_of_a_frozen_norm(kind: str) -> None:
    lens, tokens = KINDS[kind](make("llama", torch.float32)), ids(1, 9)
    name = "blocks.1.ln1.hook_scale"

    def at_scale(**context: Any) -> torch.Tensor | None:
        seen: list[torch.Tensor] = []
        embedded = lens.embed(tokens).detach().requires_grad_(True)
        hooks = [("hook_embed", lambda x, hook: embedded), (name, lambda x, hook: seen.append(x))]
        with gim.GIM(lens, **context) if context else nullcontext():
            logits = lens.run_with_hooks(tokens, fwd_hooks=hooks)
        grads = torch.autograd.grad(logits[:, -1].pow(2).sum(), seen, allow_unused=True)
        return grads[0]

    outside, ordinary_rules, frozen = at_scale(), at_scale(rules="GRADIENT"), at_scale(rules="FREEZE_ONLY")
    assert frozen is None
    # What a bridge shows here is beside the norm that it runs.
    assert (outside is None) == (ordinary_rules is None) == (kind == "bridge")
    if outside is not None and ordinary_rules is not None:
        assert_agree(ordinary_rules, outside, "gradient at the scale")
    edited, _ = lens_gradient(lens, tokens, [(name, lambda x, hook: 2 * x)], rules="GIM")
    constant, _ = lens_gradient(lens, tokens, [(name, lambda x, hook: (2 * x).detach())], rules="GIM")
    assert_agree(edited, constant, "scale edited")


@by_kind
def test_undo_is_exact_and_the_forward_ignores_the_rules(kind: str) -> None:
    lens, tokens = KINDS[kind](make("llama", torch.float32)), ids(1, 9)
    own = lens(tokens)
    before = {name: set(vars(module)) for name, module in lens.named_modules()}
    inside = []
    for preset in gim.rules.PRESETS:
        with gim.GIM(lens, rules=preset):
            inside.append(lens(tokens))
    assert all(torch.equal(inside[0], other) for other in inside[1:])
    assert_agree(inside[0], own, "logits")
    assert {name: set(vars(module)) for name, module in lens.named_modules()} == before
    assert torch.equal(lens(tokens), own)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("preset", first(gim.rules.PRESETS, ("GIM", "ATTNLRP")))
def test_an_activation_of_ones_own_is_one(preset: str) -> None:
    model, tokens = make("llama", torch.float32), ids(2, 17)
    lens = hooked(model)
    lens.blocks[1].mlp.act_fn = lambda x: x * torch.sigmoid(x)
    got, report = lens_gradient(lens, tokens, rules=preset)
    assert_agree(got, model_gradient(model, tokens, preset), preset)
    assert report.counts()["gated_mlp"] == (LAYERS, LAYERS)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")
def test_what_cannot_be_applied_is_an_error() -> None:
    lens, tokens = hooked(make("llama", torch.float32)), ids(1, 9)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn: writes its softmax out, where only factors"):
        lens_gradient(lens, tokens, q_scale=0.3)

    def by_logarithm(query_input: torch.Tensor, **_: Any) -> torch.Tensor:
        scores = query_input @ query_input.mT
        return torch.log_softmax(scores, -1).exp() @ query_input

    lens.blocks[2].attn.forward = by_logarithm
    with pytest.raises(UnsupportedModelError, match=r"blocks\.2\.attn: calls log_softmax over its scores"):
        lens_gradient(lens, tokens)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("preset", ["GIM", "ATTNLRP"])
def test_the_gradient_of_the_embedding_matrix_follows_the_rules(preset: str) -> None:
    """Its rows are looked up by indexing, and no input asks for a gradient but they."""
    model, tokens = make("llama", torch.float64).requires_grad_(True), ids(2, 17)
    lens = hooked(model).requires_grad_(True)
    with gim.GIM(lens, rules=preset) as report:
        (got,) = torch.autograd.grad(lens(tokens)[:, -1].pow(2).sum(), lens.embed.W_E)
    with gim.GIM(model, rules=preset):
        weight = model.get_input_embeddings().weight
        (want,) = torch.autograd.grad(model(tokens, use_cache=False).logits[:, -1].pow(2).sum(), weight)
    assert_agree(got, want, "gradient of the matrix")
    assert report.complete and report.counts()["gated_mlp"] == (LAYERS, LAYERS)


@pytest.mark.skipif(not HAS_HOOKED_TRANSFORMER, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_respected(side: str) -> None:
    model = make("llama", torch.float64)
    lens, tokens = hooked(model), ids(2, 17)
    mask = torch.ones_like(tokens)
    mask[0, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    got = gim.explain(lens, tokens, baseline_token_id=BASELINE, attention_mask=mask)
    want, _ = eager.attribution(model, tokens, eager.PRESETS["GIM"], baseline=BASELINE, mask=mask)
    assert_agree(got, want, side)
