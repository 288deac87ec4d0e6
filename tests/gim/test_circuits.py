"""Scores of edges and nodes, and patched runs, against the model's own code with a tensor for every reader."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gim
from gim import memory
from gim.circuits import logit_difference, metrics, scores, streams
from gim.circuits.patching import Patcher
from gim.circuits.probe import find
from gim.circuits.scores import Batch, Scorer
from gim.circuits.wiring import Wiring
from gim.plan import MemoryPlan
from gim_kernels.budget import relative_error
from tests import eager
from tests.circuit_code import NAMES, Reference
from tests.families import DROPOUT_OFF, VOCABULARY, ids, make
from tests.first import first
from tests.oracle import (
    CIRCUIT_LOGITS,
    CIRCUIT_RELATIVE,
    FLOAT64_MODEL_RELATIVE,
    FLOAT64_PLAN_RELATIVE,
    assert_close64,
)

#: Their norms compute in the model's own dtype.
IN_FLOAT64 = ("gpt2",)


def batch(tokens: int = 9) -> Batch:
    """Two pairs that differ in two tokens."""
    clean = ids(2, tokens)
    corrupted = clean.clone()
    corrupted[:, [2, 4]] = ids(2, 2, seed=5)
    return Batch(clean, corrupted, [((3,), (7, 11)), ((5,), (9,))])


def loss_of(pairs: Batch) -> Any:
    """The logit difference, written again."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        first = logits[0, 3] - (logits[0, 7] + logits[0, 11]) / 2
        return first + logits[1, 5] - logits[1, 9]

    return loss


def scorer(model: Any, wiring: Wiring, rules: str, **changes: Any) -> Scorer:
    plain = Scorer(
        model, wiring, wiring.graph(), gim.rules.get(rules), logit_difference, "edge", None, MemoryPlan("none"), "auto"
    )
    return replace(plain, **changes)


def relative(family: str) -> float:
    return FLOAT64_PLAN_RELATIVE if family in IN_FLOAT64 else CIRCUIT_RELATIVE


def check_scores(family: str, rules: str, steps: int | None = None) -> None:
    pairs, model = batch(), make(family)
    reference = Reference(family, model, eager.PRESETS[rules], pairs.clean, pairs.corrupted, loss_of(pairs))
    wiring = find(model, pairs.clean[0])
    found = scorer(model, wiring, rules, ig_steps=steps).scores(pairs)
    edges = wiring.graph().edges
    assert not found[~edges].any()
    assert_close64(found, reference.scores(steps) * edges, f"{family} {rules}", relative=relative(family))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    nodes = scorer(model, wiring, rules, ig_steps=steps, level="node").scores(pairs)
    # Of each writer: the gradient at what it writes is the sum of those of all that read it.
    assert_close64(nodes, found.sum(1), f"{family} {rules} nodes", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize(
    ("family", "rules"),
    first(
        itertools.product(NAMES, eager.PRESETS),
        lambda family, rules: (
            rules == "GIM" or (family == "llama" and rules in ("GRADIENT", "GIM_CONSTANT", "ATTNLRP"))
        ),
    ),
)
def test_scores_are_those_of_a_tensor_for_every_reader(family: str, rules: str) -> None:
    check_scores(family, rules)


@pytest.mark.parametrize("family", ["gemma2"])
def test_eap_ig_averages_gradients_from_the_corrupted_input_on(family: str) -> None:
    check_scores(family, "GRADIENT", steps=3)


@pytest.mark.parametrize("family", first(NAMES, ("llama", "gemma2", "gpt2", "gpt-neox")))
def test_a_patched_run_is_that_of_the_models_own_code(family: str) -> None:
    pairs, model = batch(), make(family)
    reference = Reference(family, model, eager.PRESETS["GRADIENT"], pairs.clean, pairs.corrupted, loss_of(pairs))
    wiring = find(model, pairs.clean[0])
    graph, patcher = wiring.graph(), Patcher(model, wiring, wiring.graph())
    own, parts = patcher.plain(pairs.corrupted)
    assert_close64(own, reference.corrupted_logits, f"{family} corrupted", relative=relative(family))
    for seed in (0, 1):
        cut = torch.rand(graph.writers, graph.readers, generator=torch.Generator().manual_seed(seed)) < 0.5
        cut = (cut & graph.edges).double()
        found, want = patcher.logits(pairs, parts, cut), reference.patched(cut)
        assert relative_error(want, reference.clean_logits) > 0.01
        assert_close64(found, want, f"{family} {seed}", relative=relative(family))


@pytest.mark.parametrize("family", first(NAMES, ("gemma2", "gpt-neox")))
def test_all_edges_are_the_model_and_none_the_corrupted_run(family: str) -> None:
    """In float32. Every edge is cut by nothing, so that every reader's own mix is made all the same."""
    pairs, model = batch(), make(family, dtype=torch.float32)
    wiring = find(model, pairs.clean[0])
    graph, patcher = wiring.graph(), Patcher(model, wiring, wiring.graph())
    _, parts = patcher.plain(pairs.corrupted)
    tiny = torch.full((graph.writers, graph.readers), 1e-12)
    with torch.no_grad():
        clean, corrupted = (model(one).logits[:, -1] for one in (pairs.clean, pairs.corrupted))
    for cut, want in ((tiny, clean), (torch.zeros_like(tiny), clean), (torch.ones_like(tiny), corrupted)):
        error = (patcher.logits(pairs, parts, cut) - want).abs().max() / want.abs().max()
        assert error <= CIRCUIT_LOGITS, f"{family}: {error:.2g}"


def check_differences(model: Any, what: str, step: float = 1e-4) -> None:
    """The gradient's score of an edge is how fast the metric falls as that edge alone is patched."""
    pairs = batch()
    wiring = find(model, pairs.clean[0])
    graph, patcher = wiring.graph(), Patcher(model, wiring, wiring.graph())
    scores = scorer(model, wiring, "GRADIENT").scores(pairs)
    parts, loss = patcher.plain(pairs.corrupted)[1], loss_of(pairs)
    found = torch.zeros_like(scores)
    for row, column in graph.edges.nonzero().tolist():
        cut = torch.zeros_like(scores)
        ends = []
        for share in (step, -step):
            cut[row, column] = share
            ends.append(-loss(patcher.logits(pairs, parts, cut)))
        found[row, column] = (ends[0] - ends[1]) / (2 * step)
    # Of a central difference the error falls with the square of the step.
    assert_close64(found, scores, what, relative=CIRCUIT_RELATIVE)


def test_the_gradients_scores_are_finite_differences_of_patching() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2, **DROPOUT_OFF
    )
    check_differences(GPT2LMHeadModel(config).double().eval(), "small")


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_finite_differences_of_every_family(family: str) -> None:
    check_differences(make(family), family)


PLANS = ("mlp", "layer", "layer+attention+tile=4", "layer+offload")


@pytest.mark.parametrize(
    ("family", "memory"),
    first(
        [*(("llama", plan) for plan in PLANS), *((family, "layer") for family in NAMES if family != "llama")],
        lambda family, plan: family == "llama" or family == "gpt2",
    ),
)
def test_every_memory_plan_gives_the_same_scores(family: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = batch(), make(family)
    wiring = find(model, pairs.clean[0])
    want = [scorer(model, wiring, "GIM", ig_steps=steps).scores(pairs) for steps in (None, 2)]
    for module in (scores, streams):  # a stop of the backward after every layer
        monkeypatch.setattr(module, "TOGETHER", 1)
    stops: list[range] = []

    def products(tiles: Any, heard: Any, graph: Any, layers: range, found: Any) -> None:
        stops.append(layers)
        streams.products(tiles, heard, graph, layers, found)

    monkeypatch.setattr(scores, "products", products)
    for steps, one in zip((None, 2), want, strict=True):
        stops.clear()
        found = scorer(model, wiring, "GIM", ig_steps=steps, plan=memory).scores(pairs)
        assert stops == [range(2, 3), range(1, 2), range(1)] * (steps or 1)
        assert_close64(found, one, f"{family} {memory}", relative=FLOAT64_PLAN_RELATIVE)
    nodes = scorer(model, wiring, "GIM", level="node", plan=memory).scores(pairs)
    assert_close64(nodes, want[0].sum(1), f"{family} {memory} nodes", relative=FLOAT64_MODEL_RELATIVE)


def test_auto_counts_what_parts_write(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = batch(), make("llama")
    wiring = find(model, pairs.clean[0])
    asked: list[int] = []

    def choose(*_: Any, free: int) -> MemoryPlan:
        asked.append(free)
        return MemoryPlan("mlp")

    monkeypatch.setattr(memory, "free_bytes", lambda _: 10**6)
    monkeypatch.setattr(memory, "choose", choose)
    one = scorer(model, wiring, "GIM", plan="auto")
    one.scores(pairs)
    held = sum(x.numel() * 8 for x in Patcher(model, wiring, wiring.graph()).plain(pairs.clean)[1])
    assert asked == [10**6 - held]


@pytest.mark.parametrize("family", ["qwen3", "gpt-neox"])
def test_tiles_of_tokens_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, model = batch(), make(family)
    wiring = find(model, pairs.clean[0])
    graph = wiring.graph()
    patcher = Patcher(model, wiring, graph)
    parts = patcher.plain(pairs.corrupted)[1]
    cut = (torch.rand(graph.writers, graph.readers, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    runs = []
    # Whole, then four tokens at a time: the last tile is shorter.
    for size in (streams.TILE_BYTES, 4 * graph.writers * graph.width * 8):
        monkeypatch.setattr(streams, "TILE_BYTES", size)
        runs.append((scorer(model, wiring, "GIM").scores(pairs), patcher.logits(pairs, parts, cut)))
    assert streams.Tiles(wiring, graph, parts, 18).size == 4
    for one, other in zip(*runs, strict=True):
        assert_close64(other, one, family, relative=FLOAT64_PLAN_RELATIVE)


def test_a_constant_softmax_tells_q_and_k_nothing() -> None:
    pairs, model = batch(), make("llama")
    wiring = find(model, pairs.clean[0])
    graph = wiring.graph()
    found = scorer(model, wiring, "GIM_CONSTANT").scores(pairs)
    for layer in range(graph.layers):
        assert not found[:, graph.branch(layer, "q")].any() and not found[:, graph.branch(layer, "k")].any()
        assert found[:, graph.branch(layer, "v")].any()


def test_grouped_key_heads_are_the_sum_of_their_query_heads() -> None:
    model, pairs = make("llama"), batch()
    wiring = find(model, pairs.clean[0])
    whole, grouped = wiring.graph(), wiring.graph(grouped=True)
    assert grouped.keys == 2 and whole.keys == 4
    scores = scorer(model, wiring, "GIM").scores(pairs)
    found = grouped.gather(scores)
    assert not found[~grouped.edges].any()
    for branch in "kv":
        mine, theirs = found[:, grouped.branch(1, branch)], scores[:, whole.branch(1, branch)]
        assert torch.equal(mine, torch.stack([theirs[:, :2].sum(1), theirs[:, 2:].sum(1)], 1))
    assert torch.equal(found[:, -1], scores[:, -1])
    assert torch.equal(grouped.expand(grouped.edges), whole.edges)


@pytest.mark.parametrize("metric", list(metrics.METRICS.values()))
def test_metrics_are_means_of_logits_and_sums_of_probabilities(metric: Any) -> None:
    logits = torch.randn(2, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = metric(logits, batch().answers)
    if metric is logit_difference:
        assert_close64(found.sum(), loss_of(batch())(logits), "logits")
    else:
        shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
        want = torch.stack([shares[0, 3] - shares[0, 7] - shares[0, 11], shares[1, 5] - shares[1, 9]])
        assert_close64(found, want, "probabilities")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("phi3", "model.layers.0 .*keys or values, which are fewer than its queries, are not all"),
        ("olmo2", "model.layers.0 .*q of head 0 is computed from 1 linear maps, or not from 12 outputs of one"),
        ("granite", "model.layers.0 .*what mlp reads is neither the layer's input nor"),
        ("falcon", "transformer.h.0 .*is not its input and what its attention and its MLP wrote"),
    ],
)
def test_models_whose_parts_are_not_all_found_are_refused_by_name(family: str, reason: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(gim.UnsupportedModelError, match=reason):
            find(make(family, dtype), ids(1, 9)[0])


@pytest.mark.parametrize("large", [1.0, 30.0])
@pytest.mark.parametrize("family", first(NAMES, ("llama", "gemma3", "gpt-neox")))
def test_a_model_in_bfloat16_has_the_wiring_of_its_numbers_in_float64(family: str, large: float) -> None:
    model = make(family, torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(large)  # beside which what parts write is as small as rounding
    found, want = (find(one, ids(1, 9)[0]) for one in (model, copy.deepcopy(model).double()))
    assert found.graph() == want.graph() and found.parallel == NAMES[family].parallel
    for ours, theirs in zip(found.layers, want.layers, strict=True):
        for one, other in ((ours.q, theirs.q), (ours.k, theirs.k), (ours.v, theirs.v)):
            assert one.linear.name == other.linear.name and torch.equal(one.columns, other.columns)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_users_hook_on_a_norm_that_runs_for_readers_is_refused(register: str) -> None:
    model = make("llama")
    handle = getattr(model.model.layers[1].input_layernorm, register)(lambda *_: None)
    with pytest.raises(
        gim.UnsupportedModelError, match=r"model.layers.1: the norm in front of its attention has hooks"
    ):
        find(model, ids(1, 9)[0])
    handle.remove()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert len(find(model, ids(1, 9)[0]).layers) == 3


def test_a_model_with_an_autocast_of_its_own_is_refused_by_name() -> None:
    model = make("llama", torch.float32)
    forward = model.forward

    def cast(*given: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*given, **named)

    model.forward = cast  # as accelerate sets it
    with pytest.raises(gim.UnsupportedModelError, match=r"layers\.0 .* is given torch.bfloat16, under an autocast"):
        find(model, ids(1, 9)[0])


def test_a_model_is_as_it_was_after_an_error() -> None:
    model, pairs = make("llama"), batch()
    wiring = find(model, pairs.clean[0])
    before = {name: set(vars(module)) for name, module in model.named_modules()}

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("in the metric")

    with pytest.raises(RuntimeError, match="in the metric"):
        scorer(model, wiring, "GIM", metric=broken).scores(pairs)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"metric must give one number a pair, \[2\], got \(\)"):
        scorer(model, wiring, "GIM", metric=lambda logits, _: logits.sum()).scores(pairs)
    with pytest.raises(ValueError, match=r"metric must give one number a pair, \[2\], got int"):
        scorer(model, wiring, "GIM", metric=lambda *_: 1).scores(pairs)
    with pytest.raises(FloatingPointError, match="metric"):
        scorer(model, wiring, "GIM", metric=lambda logits, _: logits[:, 0] / 0).scores(pairs)
