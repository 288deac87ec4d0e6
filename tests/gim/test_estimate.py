"""Predicted memory is the memory that is measured, by torch's own allocator."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import gim
from gim import offload
from gim.estimate import Twin, weight_bytes
from gim.plan import PLANS, MemoryPlan
from tests.families import ids, make
from tests.gim.test_memory import explain
from tests.gim.test_models import state
from tests.live import peak_bytes
from tests.oracle import assert_memory_close

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 4},
    "wide": {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3},
    "deep": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 10, "num_attention_heads": 6},
}
MODELS: dict[str, Any] = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**size)),
    "qwen3": lambda size: Qwen3ForCausalLM(Qwen3Config(**size, head_dim=32)),
    # Windows in the layers, which run another kernel.
    "mistral": lambda size: MistralForCausalLM(MistralConfig(**size, sliding_window=100)),
}
LENGTH = 400
#: One of each lever, and all together.
SOME = tuple(
    MemoryPlan.parse(name)
    for name in ("none", "mlp", "mlp+tile=128", "layer", "layer+attention", "layer+attention+offload+tile=128")
)


def build(family: str, size: str) -> Any:
    torch.manual_seed(0)
    shape = {**SIZES[size], "num_key_value_heads": SIZES[size]["num_attention_heads"] // 2 or 1}
    if SIZES[size]["num_attention_heads"] % shape["num_key_value_heads"]:
        shape["num_key_value_heads"] = 1
    return MODELS[family]({**shape, "vocab_size": 500, "max_position_embeddings": 4096}).eval()


def measure(model: Any, plan: MemoryPlan, length: int = LENGTH, batch: int = 1, rules: str = "GIM") -> int:
    offload.forget_pool(model)
    tokens = ids(batch, length)
    peak, _ = peak_bytes(lambda: explain(model, tokens, plan, rules=rules))
    offload.forget_pool(model)
    return peak


MEASURED = [pytest.param(*case, id="-".join(case), marks=pytest.mark.slow) for case in itertools.product(MODELS, SIZES)]


@pytest.mark.parametrize(("family", "size"), MEASURED)
def test_the_estimate_is_what_is_measured(family: str, size: str) -> None:
    model = build(family, size)
    before = state(model)
    estimates = gim.estimate_memory(model, LENGTH, plans=SOME)
    assert state(model) == before
    from_config = gim.estimate_memory(model.config, LENGTH, plans=SOME, device="cpu", dtype=torch.float32)
    assert [one.parts for one in from_config] == [one.parts for one in estimates]
    for estimate in estimates:
        assert estimate.parts["weights"] == sum(p.numel() * 4 for p in model.parameters()) + sum(
            b.numel() * b.element_size() for b in model.buffers()
        )
        measured = measure(model, estimate.plan)
        assert_memory_close(estimate.activations, measured, f"{family} {size} {estimate.plan.name}")
    assert len({one.activations for one in estimates}) == len(estimates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rules", "batch", "explained"),
    [
        pytest.param(torch.bfloat16, "GIM", 1, 1, marks=pytest.mark.slow),
        pytest.param(torch.float32, "GRADIENT", 1, 1, marks=pytest.mark.slow),
        (torch.float32, "GIM_CONSTANT", 2, 1),
        (torch.float32, "GIM", 1, 40),
    ],
    ids=["bfloat16", "gradient", "batch", "explained"],
)
def test_the_estimate_knows_types_rules_batches_and_positions(
    dtype: torch.dtype, rules: str, batch: int, explained: int
) -> None:
    model = build("llama", "small").to(dtype)
    length = 400
    plans = (MemoryPlan("none"), MemoryPlan("layer", mlp_tile=100))
    named: dict[str, Any] = {"rules": rules, "batch": batch, "explained": explained}
    tokens = ids(batch, length)
    positions = torch.arange(length - explained, length).expand(batch, -1)
    for estimate in gim.estimate_memory(model, length, plans=plans, **named):
        peak, _ = peak_bytes(lambda plan=estimate.plan: explain(model, tokens, plan, positions=positions, rules=rules))
        assert_memory_close(estimate.activations, peak, f"{estimate.plan.name} {named}")


def test_a_twin_estimates_the_same_in_every_thread_and_stays_open_in_none() -> None:
    twin = Twin(build("llama", "small").config, gim.rules.GIM, device="cpu")
    assert type(eval_frame._stance) is eval_frame.DynamoStance
    here = twin.estimate(MemoryPlan("none"), 300)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(twin.estimate, MemoryPlan("none"), 300).result()
    assert there == here and here.activations > 0
    bare = Twin(build("llama", "small").config, gim.rules.GRADIENT, device="cpu").estimate(MemoryPlan("none"), 300)
    assert bare.parts != here.parts  # so that rules that were not followed would show


@pytest.mark.slow
def test_memory_is_linear_in_the_prompt_for_every_plan() -> None:
    twin = Twin(build("llama", "deep").config, gim.rules.GIM, device="cpu")
    for plan in (*PLANS, MemoryPlan("none", head="all"), MemoryPlan("layer", mlp_tile=128)):
        sizes = [twin.estimate(plan, length).activations for length in (2048, 4096, 8192)]
        for shorter, longer in pairwise(sizes):
            assert longer <= 2 * shorter, f"{plan.name}: {sizes}"
    short, long = (measure(build("llama", "small"), MemoryPlan("layer", mlp_tile=128), n) for n in (500, 1000))
    assert long <= 2 * short


@pytest.mark.slow
def test_the_leanest_plan_holds_checkpoints_and_two_working_sets() -> None:
    """16k tokens of the configuration that the benchmarks use on a CPU: 8 layers, hidden size 512."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    tokens, number = 16384, 4
    # One layer's working set: queries, keys, values, attention's output and log-sum-exp, the branches of the MLP.
    working_set = tokens * number * (512 + 2 * 128 + 512 + 8 + 2 * 1408)
    checkpoints = tokens * number * 8 * 512
    plans = [plan for plan in PLANS if plan.offload == "none"]
    found = [one.activations for one in gim.estimate_memory(config, tokens, plans=plans, device="cpu")]
    assert min(found) <= 2 * working_set + checkpoints
    assert min(found) < found[0] / 3


@pytest.mark.slow
def test_every_further_layer_costs_what_the_plan_keeps() -> None:
    def activations(layers: int, plan: MemoryPlan) -> int:
        shape = {**SIZES["small"], "num_hidden_layers": layers, "vocab_size": 500, "num_key_value_heads": 2}
        return gim.estimate_memory(LlamaConfig(**shape), 1000, plans=[plan], device="cpu")[0].activations

    hidden, row = 1000 * 64 * 4, 1000 * 4 * 4
    for plan, kept in ((MemoryPlan("layer"), hidden), (MemoryPlan("layer", True), 2 * hidden + row)):
        assert activations(30, plan) - activations(20, plan) == 10 * kept


def test_cost_counts_what_runs_again() -> None:
    # Lengths at which attention is nothing, and at which it is all.
    config = LlamaConfig(**SIZES["small"], num_key_value_heads=2, vocab_size=500)
    plans = [MemoryPlan("none"), MemoryPlan("layer", keep_attention=True), MemoryPlan("layer")]
    short = [one.relative_cost for one in gim.estimate_memory(config, 16, plans=plans, device="cpu")]
    long = [one.relative_cost for one in gim.estimate_memory(config, 1 << 17, plans=plans, device="cpu")]
    assert short[0] == long[0] == 1.0
    assert short[1] == pytest.approx(short[2], rel=0.02) and 1.2 < short[2] < 1.5
    # Two products forward, five backward: running attention again is 2 in 7, less the last layer.
    assert long[1] < 1.01 and long[2] == pytest.approx(9 / 7, rel=0.02)


def test_a_gpu_is_accounted_with_its_own_kernels() -> None:
    # An MLP so narrow that attention is the peak, whose scores only a CPU holds.
    config = LlamaConfig(**{**SIZES["small"], "intermediate_size": 32}, num_key_value_heads=2, vocab_size=500)
    (cpu,) = gim.estimate_memory(config, 2048, plans=PLANS[:1], device="cpu")
    (gpu,) = gim.estimate_memory(config, 2048, plans=PLANS[:1])
    assert gpu.device == "cuda" and gpu.activations < cpu.activations
    plan = MemoryPlan("layer", offload="cpu", mlp_tile=128)
    (gpu,) = gim.estimate_memory(config, 2048, plans=[plan])
    assert gpu.host == 5 * 2048 * 64 * 4  # every layer's input but the last's
    assert gpu.peak == sum(gpu.parts.values())
    (cpu,) = gim.estimate_memory(config, 2048, plans=[plan], device="cpu")
    assert cpu.peak == sum(cpu.parts.values()) + cpu.host


@pytest.mark.slow
@pytest.mark.parametrize("plan", SOME, ids=lambda plan: plan.name)
def test_the_longest_prompt_fits_and_hardly_more_does(plan: MemoryPlan) -> None:
    twin = Twin(build("llama", "deep").config, gim.rules.GIM, device="cpu")
    memory = twin.weights + 200 * 2**20
    longest = twin.longest(plan, memory)
    assert twin.estimate(plan, longest).peak <= memory
    assert twin.estimate(plan, longest + longest // 50).peak > memory
    assert twin.longest(plan, twin.weights) == 0
    assert twin.longest(plan, twin.weights - 1) == 0


def test_bad_input() -> None:
    config = LlamaConfig(**SIZES["small"])
    for name, value in (("tokens", 0), ("batch", -1), ("explained", 1.5)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1, got {value}"):
            gim.estimate_memory(config, **{"tokens": 8, name: value})
    with pytest.raises(ValueError, match="explained must be at most the 8 tokens, got 9"):
        gim.estimate_memory(config, 8, explained=9)
    with pytest.raises(gim.EstimateError, match="model_or_config must be a model or its config, got object"):
        gim.estimate_memory(object(), 8)


class Peeks(nn.Module):
    """An MLP that looks at the numbers."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x) if float(x.abs().amax()) < 1e9 else x


class PeekingLlama(LlamaForCausalLM):
    """A Llama whose memory cannot be told."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Peeks(layer.mlp)


def test_a_model_that_looks_at_numbers_says_so_and_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("llama").config
    model = PeekingLlama(config).eval()
    with pytest.raises(gim.EstimateError, match="PeekingLlama cannot be run on tensors without data"):
        gim.estimate_memory(model, 8)
    monkeypatch.setattr(gim.memory, "free_bytes", lambda _: 1)
    # Nothing can be told, so auto takes the least that any model can do with.
    want = gim.explain(model, ids(1, 9), baseline_token_id=3, memory="none")
    got = gim.explain(model, ids(1, 9), baseline_token_id=3, memory="auto")
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)


def test_weights_that_share_memory_count_once() -> None:
    config = LlamaConfig(**SIZES["small"], vocab_size=500, tie_word_embeddings=True)
    tied = LlamaForCausalLM(config)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    (estimate,) = gim.estimate_memory(config, 8, plans=PLANS[:1], dtype=torch.float32)
    assert estimate.parts["weights"] == weight_bytes(tied)
