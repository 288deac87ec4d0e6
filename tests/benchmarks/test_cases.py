"""Cases count what they say they count, and the eager rival is the tests' own implementation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import cases, decoder
from benchmarks.cases import DECODERS, SUITES, AttentionCase, ExplainCase, PointwiseCase
from benchmarks.systems import OURS, SYSTEMS, executed_flops, own_case, rule_of, systems_of
from tests import eager
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64, assert_within_budget

CPU = torch.device("cpu")
CASE = AttentionCase("temperature", 16, 64, 4, 2, False, "float64")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rule", "products"), [("temperature", 6), ("exact", 6), ("constant", 3)])
def test_executed_operations_are_those_that_torch_counts(rule: cases.Rule, products: int, causal: bool) -> None:
    case = dataclasses.replace(CASE, rule=rule, causal=causal)
    system = next(one for one in SYSTEMS["attention"] if one.name == "eager GIM")
    run = system.prepare(case, case.inputs(CPU), CPU)
    with FlopCounterMode(display=False) as counter:
        run()
    # Eager computes what the mask hides, too.
    assert counter.get_total_flops() == products * 2 * 4 * 64 * 64 * 16
    assert executed_flops(case, system, CPU) == pytest.approx(counter.get_total_flops())


def test_operations_as_flashattention_counts_them() -> None:
    assert CASE.flops() == 7 * 2 * 4 * 64**2 * 16
    assert dataclasses.replace(CASE, rule="constant").flops() == 4 * 2 * 4 * 64**2 * 16
    assert dataclasses.replace(CASE, part="forward").flops() == 2 * 2 * 4 * 64**2 * 16
    visible = torch.ones(64, 64).tril().sum().item()
    assert dataclasses.replace(CASE, causal=True).flops() == 7 * 2 * 4 * visible * 16


#: Rows of the numbers on which norms and MLPs are recognised.
PROBES = (2, 3, 5)


class MatrixProducts(TorchDispatchMode):
    """Counts the operations of matrix products in the backward too; attention's own are inside its operators."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].shape[0] not in PROBES:
            self.operations += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["GIM", "GRADIENT", "GIM_CONSTANT"])
def test_operations_of_an_attribution_are_those_that_torch_counts(preset: str) -> None:
    case = ExplainCase("llama-4x256", 64, "float32", dataclasses.replace(DECODERS["llama-4x256"], layers=3))
    system = next(one for one in SYSTEMS["explain"] if one.rule == preset)
    run = system.prepare(case, case.build(CPU), CPU)
    with MatrixProducts() as products:
        run()
    one, own = case.sizes, own_case(case, system)
    constant = preset == "GIM_CONSTANT"
    # What is needed at the explained position alone: the head and the last layer's MLP, which run there alone, and
    # its queries and output, which we compute everywhere.
    alone = 2 * 2 * (one.vocabulary * one.hidden + 3 * one.hidden * one.inner)
    everywhere = (2 * 2 - constant) * 2 * one.hidden * one.heads * one.head_size * 64
    scores = (one.layers - 1) * one.heads * 64 * 65 / 2
    attention = (4 if constant else 7) * 2 * one.head_size * scores
    assert own.flops() - attention + alone + everywhere == products.operations


def test_operations_of_windows_are_those_of_the_scores_they_leave() -> None:
    assert ExplainCase("Gemma-2-2B", 8, "float32").sizes.windows == (4096, None) * 13
    case = ExplainCase("Gemma-2-2B", 6000, "float32")
    position = torch.arange(6000)
    visible = position[None, :] <= position[:, None]
    inside = visible & (position[None, :] > position[:, None] - 4096)
    wide = dataclasses.replace(case, decoder=dataclasses.replace(case.sizes, options={"sliding_window": None}))
    hidden = 13 * 8 * int(visible.sum() - inside.sum())
    assert wide.flops() - case.flops() == 7 * 2 * 256 * hidden


def test_bytes_are_those_of_the_tensors() -> None:
    query, key, value, grad = CASE.inputs(CPU)
    lse = 4 * query.shape[1] * query.shape[2]
    forward = query.nbytes + key.nbytes + value.nbytes + query.nbytes + lse
    backward = 4 * grad.nbytes + 2 * (key.nbytes + value.nbytes) + lse
    assert dataclasses.replace(CASE, part="forward").bytes() == forward
    assert CASE.bytes() == forward + backward
    gated = PointwiseCase("gated", 8, 32, "bfloat16")
    assert gated.bytes() == 8 * gated.inputs(CPU)[0].nbytes


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_as_many_weights_as_they_say(name: str) -> None:
    sizes = DECODERS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes.config())
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 2}
    assert sizes.parameters_in_layers == sum(n for name, n in matrices.items() if ".layers." in name)
    assert sizes.parameters == sum(matrices.values())


@pytest.mark.parametrize(("suite", "device"), [(suite, device) for suite in SUITES for device in ("cpu", "cuda")])
def test_cases_have_names_of_their_own_and_systems_with_ours_first(suite: str, device: str) -> None:
    found = SUITES[suite][device]
    assert len({case.name for case in found}) == len(found) > 0
    for case in found:
        systems = systems_of(case, torch.device(device))
        assert systems[0].name.startswith(OURS)
        assert len({system.name for system in systems}) == len(systems) > 1
        assert case.flops() > 0 and case.bytes() > 0
        assert case.small().tokens <= cases.CHECK_TOKENS


def test_rivals_that_need_a_gpu_are_listed_on_gpus_only() -> None:
    case = AttentionCase("exact", 128, 8192, 32, 8, True, "bfloat16")
    on_gpu = {system.name for system in systems_of(case, torch.device("cuda"))}
    on_cpu = {system.name for system in systems_of(case, CPU)}
    only = {"torch SDPA, exact, deterministic", "cuDNN SDPA, exact", "FlexAttention, exact"}
    assert on_gpu - on_cpu == only and on_cpu < on_gpu
    shorter = systems_of(dataclasses.replace(case, tokens=4096), torch.device("cuda"))
    assert {system.name for system in shorter} == on_gpu - {"FlexAttention, exact"}


def test_a_rival_is_held_to_the_rule_that_it_computes_and_its_operations_are_its_own() -> None:
    case = AttentionCase("constant", 16, 64, 2, 2, True, "float32")
    exact = next(one for one in SYSTEMS["attention"] if one.name == "torch SDPA, exact")
    ours = SYSTEMS["attention"][0]
    assert rule_of(exact, case) == "exact" and rule_of(ours, case) == "constant"
    assert own_case(case, exact).flops() / own_case(case, ours).flops() == pytest.approx(7 / 4)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("preset", ["GIM", "GIM_CONSTANT", "GRADIENT", "FREEZE_ONLY", "SCALES_ONLY", "TSG_ONLY"])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen2.5-1.5B"])
def test_the_eager_rival_equals_the_tests_own_implementation(name: str, preset: str, chunk: int | None) -> None:
    case = dataclasses.replace(ExplainCase(name, 40, "float64").small(), tokens=40)
    model, ids = case.build(CPU)
    found = decoder.attribution(model, ids, preset, target=3, baseline=5, chunk=chunk)
    truth, _ = eager.attribution(model, ids, eager.PRESETS[preset], baseline=5, target=3)
    assert_close64(found, truth[0], preset, FLOAT64_MODEL_RELATIVE)


def test_the_eager_rival_knows_gemma() -> None:
    """Windows, softcaps, four norms with an offset: its exact gradient is that of the model itself."""
    options = {**DECODERS["Gemma-2-2B"].options, "sliding_window": 8, "attn_implementation": "eager"}
    sizes = dataclasses.replace(ExplainCase("Gemma-2-2B", 24, "float32").small().sizes, options=options)
    model, ids = ExplainCase("Gemma-2-2B", 24, "float32", sizes).build(CPU)
    for parameter in model.parameters():
        parameter.mul_(4)  # so that softcaps and gates are far from linear
    embedding = model.get_input_embeddings()
    embedded = embedding(ids).detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[0, -1, 3], embedded)
    actual = ((embedded.detach() - embedding(torch.tensor([5]))) * grad).sum(-1)[0]
    # The model itself computes norms and softmax in float32 whatever its type, so that is where they can be compared.
    truth, plain = (
        decoder.attribution(model, ids, "GRADIENT", target=3, baseline=5, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(actual, truth, plain, "Gemma")


def test_another_family_is_refused_by_the_eager_rival() -> None:
    case = ExplainCase("other", 16, "float32", dataclasses.replace(DECODERS["llama-4x256"], family="mistral", layers=1))
    model, ids = case.build(CPU)
    with pytest.raises(NotImplementedError, match="not written for mistral"):
        decoder.attribution(model, ids, "GIM", target=1, baseline=0)
