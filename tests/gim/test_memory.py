"""Every memory plan gives the same attributions, does what it says, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import gim
from gim import memory, offload, scoring
from gim.applied import UnsupportedModelError
from gim.checkpoint import spans
from gim.estimate import Twin
from gim.inputs import check_ids
from gim.parts import anatomy
from gim.plan import CHECKPOINTS, HEADS, MLP_TILE, OFFLOADS, PLANS, MemoryPlan
from gim_kernels import blockwise
from gim_kernels.budget import relative_error
from tests.families import FAMILIES, ids, make
from tests.first import first
from tests.gim.test_models import enable_checkpoints, state
from tests.oracle import FLOAT64_PLAN_RELATIVE, assert_close64

BASELINE = 3
LENGTH = 19
TILES = (None, 1, 5, LENGTH, 64)


def every_plan() -> list[MemoryPlan]:
    """Every combination of levers that is a plan."""
    found = []
    for values in itertools.product(CHECKPOINTS, (False, True), OFFLOADS, TILES, HEADS):
        try:
            found.append(MemoryPlan(*values))
        except ValueError:
            assert values[0] == "none"
    return found


def explain(
    model: Any,
    tokens: torch.Tensor,
    plan: MemoryPlan,
    *,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    rules: str = "GIM",
    progress: Any = None,
) -> scoring.Result:
    """One attribution under exactly this plan."""
    tokens, mask = check_ids(model, tokens, mask)
    if positions is None:
        positions = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1)
    terms = scoring.Terms(positions, torch.full_like(positions, 7), torch.ones_like(positions), "logprob")
    request = scoring.Request.of(tokens, mask, terms)
    return scoring.run(model, request, BASELINE, gim.rules.get(rules), plan, progress)


def close(got: scoring.Result, want: scoring.Result, what: str) -> None:
    assert_close64(got.scores, want.scores, what, relative=FLOAT64_PLAN_RELATIVE)
    assert_close64(got.values, want.values, what, relative=FLOAT64_PLAN_RELATIVE)
    assert got.report.counts() == want.report.counts(), what
    assert got.report.complete and got.report.forwards == 1


# The plan that keeps everything, at every position, is the one that the tests of the models hold against eager GIM.
EVERYTHING = MemoryPlan("none", head="all")


#: Each lever, alone where it can be and with others: what the fast suite runs. The whole one adds those that ``"auto"``
#: chooses among, or all there are.
SOME = tuple(
    map(MemoryPlan.parse, ("none", "layer", "layer+head=all", "mlp", "mlp+tile=5", "layer+attention+offload+tile=5"))
)
by_plans = pytest.mark.parametrize(
    "plans", [pytest.param(SOME, id="some"), pytest.param((*PLANS, *SOME), id="auto's too", marks=pytest.mark.slow)]
)


#: One of each layout; the others repeat the proof.
LAYOUTS = ("llama", "qwen3", "gemma2", "phi3", "cohere2", "mixtral", "gpt2")


@pytest.mark.parametrize("family", first(FAMILIES, LAYOUTS))
def test_every_lever_gives_the_same_attribution(family: str) -> None:
    hold_plans(family, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_of_levers_gives_the_same_attribution(family: str) -> None:
    hold_plans(family, every_plan())


def hold_plans(family: str, plans: Sequence[MemoryPlan]) -> None:
    model, tokens = make(family), ids(2, LENGTH)
    before = state(model)
    want = explain(model, tokens, EVERYTHING)
    experts = any("Experts" in name for name in FAMILIES[family].products)
    for plan in plans:
        if experts and (plan.checkpoint == "mlp" or plan.mlp_tile is not None):
            with pytest.raises(ValueError, match="is a mixture of experts, not one MLP for every token"):
                explain(model, tokens, plan)
        else:
            close(explain(model, tokens, plan), want, plan.name)
    assert state(model) == before


@by_plans
@pytest.mark.parametrize(
    "rules", first((name for name in gim.rules.PRESETS if name != "GIM"), ("GRADIENT", "GIM_CONSTANT", "ATTNLRP"))
)
def test_every_rule_set_is_kept_by_every_lever(rules: str, plans: Sequence[MemoryPlan]) -> None:
    model, tokens = make("qwen3"), ids(1, LENGTH)
    want = explain(model, tokens, EVERYTHING, rules=rules)
    for plan in plans:
        close(explain(model, tokens, plan, rules=rules), want, plan.name)


@by_plans
@pytest.mark.parametrize("side", first(("left", "right"), ("left",)))
def test_padding_and_several_positions(side: str, plans: Sequence[MemoryPlan]) -> None:
    model, tokens = make("mistral"), ids(3, LENGTH)
    mask = torch.ones_like(tokens)
    (mask[1].__setitem__(slice(0, 6), 0) if side == "left" else mask[1].__setitem__(slice(-6, None), 0))
    # Runs of neighbours and single positions, other ones in each row.
    positions = torch.tensor([[18, 17, 3], [9, 8, 12], [18, 0, 16]])
    want = explain(model, tokens, EVERYTHING, mask=mask, positions=positions)
    for plan in plans:
        close(explain(model, tokens, plan, mask=mask, positions=positions), want, plan.name)


def test_plans_leave_the_forward_alone_bit_for_bit() -> None:
    model, tokens = make("llama", torch.float32), ids(2, LENGTH)
    want = explain(model, tokens, PLANS[0]).values
    for plan in (*PLANS, MemoryPlan("layer", True, "cpu", 5)):
        assert torch.equal(explain(model, tokens, plan).values, want), plan.name


@pytest.mark.parametrize(
    "plans", [pytest.param(SOME, id="some"), pytest.param(every_plan(), id="every plan", marks=pytest.mark.slow)]
)
def test_one_token_and_lists_of_one_layer(plans: Sequence[MemoryPlan]) -> None:
    model = make("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]])
    for tokens in (ids(1, 1), ids(1, 7)):
        want = explain(model, tokens, EVERYTHING)
        for plan in plans:
            close(explain(model, tokens, plan), want, plan.name)


class Twice(nn.Module):
    """A weight that is computed at every call."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2.0 * weight


def _shared_layer(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def _shared_mlp(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def _sharing_with_the_last(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        setattr(model.model.layers[0], part, getattr(model.model.layers[2], part))

    return change


def _last_layer_first(model: Any) -> None:
    model.model.layers[0] = model.model.layers[2]


def _computed_weights(model: Any) -> None:
    for layer in model.model.layers:
        nn.utils.parametrize.register_parametrization(layer.mlp.gate_proj, "weight", Twice())
        nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)


#: Parts that an earlier layer shares with the last, whose own run at the explained positions alone.
SHARED_WITH_THE_LAST = [
    _last_layer_first,
    *map(_sharing_with_the_last, ("mlp", "self_attn", "input_layernorm", "post_attention_layernorm")),
]


@by_plans
@pytest.mark.parametrize(
    "change",
    first(
        [_shared_layer, _shared_mlp, _computed_weights, *SHARED_WITH_THE_LAST],
        {_shared_layer, _computed_weights, *SHARED_WITH_THE_LAST[:3]},
    ),
)
def test_models_built_otherwise_equal_their_full_forward(
    change: Callable[[Any], None], plans: Sequence[MemoryPlan]
) -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    change(model)
    want = explain(model, tokens, EVERYTHING)
    for plan in plans:
        close(explain(model, tokens, plan), want, plan.name)


class Scaling(LlamaDecoderLayer):
    """Writes into what its norm gives, or was given, before its MLP reads what it gave."""

    written: ClassVar[str]

    def forward(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        hidden = hidden_states + self.self_attn(self.input_layernorm(hidden_states), *others, **named)[0]
        source = hidden * 1.5
        normed = self.post_attention_layernorm(source)
        {"output": normed, "input": source}[self.written].mul_(1.7)
        return hidden + source + self.mlp(normed)


def _writing(written: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        layer.__class__ = type("Scaling", (Scaling,), {"written": written})

    return change


STEER = torch.linspace(0.0, 1.0, 48, dtype=torch.float64)
#: What may happen to what a norm gives before the MLP behind it reads it.
BETWEEN: dict[str, Callable[[Any], Any]] = {
    "code writes into it": _writing("output"),
    "code writes into what it was computed from": _writing("input"),
    "a hook on the norm": lambda layer: layer.post_attention_layernorm.register_forward_hook(
        lambda _, __, out: (out.add_(STEER), None)[1]
    ),
    "a hook on the MLP": lambda layer: layer.mlp.register_forward_pre_hook(
        lambda _, given: (given[0].mul_(1.5), None)[1]
    ),
    "a hook on its gradient": lambda layer: layer.post_attention_layernorm.register_forward_hook(
        lambda _, __, out: (out.register_hook(lambda grad: grad * STEER), None)[1]
    ),
}


@pytest.mark.parametrize(
    "how",
    first(BETWEEN, ("code writes into what it was computed from", "a hook on the norm", "a hook on its gradient")),
)
def test_what_happens_between_a_norm_and_its_mlp_is_kept(how: str) -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    plain = explain(model, tokens, EVERYTHING)
    BETWEEN[how](model.model.layers[1])
    want = explain(model, tokens, EVERYTHING)
    assert relative_error(want.scores, plain.scores) > 1e-3
    for name in ("mlp", "mlp+tile=5", "layer+attention+tile=5", "layer"):
        close(explain(model, tokens, MemoryPlan.parse(name)), want, name)


class Placed(nn.Module):
    """A norm whose result depends on the place of a token."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.norm = norm.weight, (norm,)  # no child, as a norm has none

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm[0](x)
        return out * (1 + torch.arange(x.shape[1])[:, None] / 8)


class Choosing(nn.Module):
    """An MLP that does one thing or another to all tokens, by how large any number of theirs is."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(x)
        return out * 2 if bool((x.abs() > 3.0).any()) else out


@pytest.mark.parametrize("name", ["none", "mlp", "mlp+tile=2", "layer+attention+tile=5", "layer+tile=4+head=all"])
@pytest.mark.parametrize(("part", "other"), [("post_attention_layernorm", Placed), ("mlp", Choosing)])
def test_what_looks_at_places_or_at_all_tokens_runs_whole(part: str, other: type[nn.Module], name: str) -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    for layer in model.model.layers:
        setattr(layer, part, other(getattr(layer, part)))
    want = explain(model, tokens, EVERYTHING)
    close(explain(model, tokens, MemoryPlan.parse(name)), want, name)


def test_a_gradient_that_a_norms_output_retains_is_whole() -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    kept: list[torch.Tensor] = []

    def hook(_: nn.Module, __: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    model.model.layers[1].post_attention_layernorm.register_forward_hook(hook)
    found = []
    for name in ("none", "mlp", "mlp+tile=5"):
        kept.clear()
        explain(model, tokens, MemoryPlan.parse(name))
        assert kept[0].grad is not None, name
        found.append(kept[0].grad)
    assert_close64(found[1], found[0], "mlp", relative=FLOAT64_PLAN_RELATIVE)
    assert_close64(found[2], found[0], "mlp+tile=5", relative=FLOAT64_PLAN_RELATIVE)


class ByName(LlamaDecoderLayer):
    """Hands its hidden states to its own code under a name of its choice, behind an argument that is none."""

    def __call__(self, hidden_states: torch.Tensor, **named: Any) -> Any:
        return super().__call__(turned=named.pop("position_embeddings"), x=hidden_states, **named)

    def forward(self, *, turned: Any, x: torch.Tensor, **named: Any) -> Any:
        return super().forward(x, position_embeddings=turned, **named)


def test_layers_may_call_their_hidden_states_by_any_name() -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    want = explain(model, tokens, EVERYTHING)
    asked: list[tuple[str, int, int]] = []
    explain(model, tokens, MemoryPlan(), progress=lambda *said: asked.append(said))
    by_layer = _layers_of(model)
    for layer in model.model.layers:
        layer.__class__ = ByName
    for plan in SOME:
        close(explain(model, tokens, plan), want, plan.name)
    told: list[tuple[str, int, int]] = []
    explain(model, tokens, MemoryPlan(), progress=lambda *said: told.append(said))
    assert told == asked and ("backward", 3, 3) in told
    assert torch.equal(_layers_of(model), by_layer)


def _layers_of(model: Any) -> torch.Tensor:
    """Scores of what each layer reads, under a plan that runs layers again."""
    found = memory.run(*request(model), memory="layer", progress=None, per="layer").inside
    assert found is not None
    return found


def test_an_mlp_whose_forward_was_set_is_named() -> None:
    model = make("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)
    with pytest.raises(ValueError, match=r"the forward of its mlp \(LlamaMLP\).* has been set from outside"):
        explain(model, ids(1, LENGTH), MemoryPlan("mlp"))


def test_spans() -> None:
    assert spans(torch.tensor([0, 1, 2, 5, 7, 8])) == ((0, 3), (5, 6), (7, 9))


# ---- what each lever does


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Queries of every forward of attention, and whether it ran in a backward."""
    found: list[tuple[int, bool]] = []
    original = blockwise.attention_forward

    def spy(query: torch.Tensor, *others: Any) -> Any:
        found.append((query.shape[2], torch._C._current_graph_task_id() != -1))
        return original(query, *others)

    monkeypatch.setattr(blockwise, "attention_forward", spy)
    return found


def test_kept_attention_does_not_run_again(calls: list[tuple[int, bool]]) -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    explain(model, tokens, MemoryPlan("layer"))
    # The last layer has one query and no checkpoint; the two others run again.
    assert calls == [(LENGTH, False), (LENGTH, False), (1, False), (LENGTH, True), (LENGTH, True)]
    calls.clear()
    explain(model, tokens, MemoryPlan("layer", keep_attention=True))
    assert calls == [(LENGTH, False), (LENGTH, False), (1, False)]
    calls.clear()
    explain(model, tokens, MemoryPlan("none"), positions=torch.tensor([[3, 4, 9]]))
    assert calls == [(LENGTH, False), (LENGTH, False), (2, False), (1, False)]
    calls.clear()
    explain(model, tokens, MemoryPlan("none", head="all"))
    assert calls == 3 * [(LENGTH, False)]


class Spy(nn.Linear):
    """Notes how many tokens it is called with, and whether that is in a backward."""

    #: Of the class: what a module keeps on itself is put back after it has run again.
    seen: ClassVar[list[tuple[int, bool]]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 2:  # not a probe
            self.seen.append((x.shape[1], torch._C._current_graph_task_id() != -1))
        return super().forward(x)


def test_mlps_run_whole_in_the_forward_and_in_tiles_in_the_backward() -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    gate = model.model.layers[1].mlp.gate_proj
    gate.__class__ = Spy
    gate.seen.clear()
    explain(model, tokens, MemoryPlan("mlp", mlp_tile=8))
    assert gate.seen == [(LENGTH, False), (8, True), (8, True), (3, True)]
    gate.seen.clear()
    explain(model, tokens, MemoryPlan("layer", mlp_tile=8))
    # Under a checkpoint of the layer, the MLP runs again in tiles only: never whole, and only once.
    assert gate.seen == [(LENGTH, False), (8, True), (8, True), (3, True)]


def test_an_mlp_with_a_hook_inside_runs_whole_and_the_hook_never_on_numbers_of_ours() -> None:
    """What a hook does to one token may depend on all."""
    model, tokens = make("llama"), ids(2, LENGTH)
    shapes: list[tuple[int, ...]] = []
    steer = torch.zeros(LENGTH, 1, dtype=torch.float64)
    steer[5] = 2.0

    def hook(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(out.shape))
        return out + steer

    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(hook)
    want = explain(model, tokens, MemoryPlan("none", head="all"))
    assert set(shapes) == {(2, LENGTH, model.config.intermediate_size)} and len(shapes) == len(model.model.layers)
    for plan in (MemoryPlan("mlp", mlp_tile=8), MemoryPlan("layer", mlp_tile=8), MemoryPlan("none")):
        shapes.clear()
        close(explain(model, tokens, plan), want, plan.name)
        assert set(shapes) == {(2, LENGTH, model.config.intermediate_size)}


def test_a_tile_holds_a_few_tokens_of_the_norms_input() -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    shapes: list[int] = []
    original = torch.ops.gim_kernels.norm_backward.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original:
                shapes.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        explain(model, tokens, MemoryPlan("mlp", mlp_tile=8))
    # Final norm; the last layer's two; then in each layer the norm before the MLP in tiles, the other whole.
    assert shapes == 3 * [LENGTH] + 2 * [8, 8, 3, LENGTH]


def test_a_hook_for_all_modules_sees_no_numbers_of_ours_and_mlps_run_whole() -> None:
    model, tokens = make("llama"), ids(2, LENGTH)
    shown: set[tuple[int, ...]] = set()
    mixing = model.model.layers[1].mlp.down_proj

    def hook(module: nn.Module, _: Any, out: Any) -> Any:
        if isinstance(module, nn.Linear):
            shown.add(tuple(out.shape[:2]))
        return out + out[:, 2:3] if module is mixing else None

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        want = explain(model, tokens, EVERYTHING)
        for plan in SOME:
            close(explain(model, tokens, plan), want, plan.name)
    finally:
        handle.remove()
    assert shown == {(2, LENGTH)}


def test_plans_that_run_mlps_in_parts_are_refused_by_name_under_autocast() -> None:
    model, tokens = make("llama", torch.float32), ids(1, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        want = explain(model, tokens, MemoryPlan("none")).scores
        for plan in ("mlp", "layer+tile=5"):
            with pytest.raises(ValueError, match=r"runs MLPs in parts, which is not done under torch\.autocast"):
                explain(model, tokens, MemoryPlan.parse(plan))
        for plan in ("layer", "layer+attention"):
            assert torch.equal(explain(model, tokens, MemoryPlan.parse(plan)).scores, want), plan


def test_a_model_of_inference_mode_is_named_and_left_as_it_was() -> None:
    with torch.inference_mode():
        model = make("llama")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight was made under torch\.inference_mode\(\)"):
        explain(model, ids(1, LENGTH), MemoryPlan())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_offloading_reuses_its_buffers() -> None:
    model, plan = make("llama"), MemoryPlan("layer", keep_attention=True, offload="cpu")
    explain(model, ids(1, LENGTH), plan)
    pool = offload.pool_of(model, pinned=False)
    size = LENGTH * 48 * 8  # a layer's input in float64; attention's output is as large, its log-sum-exp smaller
    expected = 2 * (2 * size + LENGTH * 4 * 8)  # two layers have checkpoints, the last has not
    assert (pool.allocations, pool.held_bytes) == (6, expected)
    explain(model, ids(1, LENGTH), plan)
    assert (pool.allocations, pool.held_bytes) == (6, expected)
    explain(model, ids(1, 5), plan)  # never more than the run before it needed
    assert pool.held_bytes == expected * 5 // LENGTH
    with pytest.raises(FloatingPointError):
        broken = model.model.layers[2].mlp.up_proj.weight
        with torch.no_grad():
            broken[0, 0] = float("nan")
        explain(model, ids(1, 5), plan)
    assert pool.held_bytes == expected * 5 // LENGTH  # given back after an error too
    gone = weakref.ref(pool)
    del pool, model, broken
    gc.collect()
    assert gone() is None  # freed with its model


def test_offloaded_tensors_keep_their_strides() -> None:
    pool = offload.HostPool(pinned=False)
    cases = [torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(4, 6)[:, ::2], torch.randn(3, 1, 2), torch.ones(0, 4)]
    for x in cases:
        moved = offload.Offload(pool, x.device)
        back = moved.unpack(moved.pack(x, 0))
        assert torch.equal(back, x)
        assert back.data_ptr() != x.data_ptr() or x.numel() == 0
        moved.close()
    assert back.shape == (0, 4)
    transposed = cases[0]
    moved = offload.Offload(pool, transposed.device, ahead=True)
    assert moved.unpack(moved.pack(transposed, 0)).stride() == transposed.stride()


@pytest.mark.parametrize("plan", ["mlp+tile=5", "layer+attention+offload+tile=5", "layer+head=all"])
def test_progress_hears_every_layer_once(plan: str) -> None:
    heard: list[tuple[str, int, int]] = []
    explain(make("llama"), ids(1, LENGTH), MemoryPlan.parse(plan), progress=lambda *event: heard.append(event))
    forward = [("forward", done, 3) for done in range(4)]
    assert heard == forward + [("backward", done, 3) for done in (1, 2, 3)]


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoint": "some"}, ValueError, "checkpoint must be one of .*got 'some'"),
        ({"offload": "disk"}, ValueError, "offload must be one of .*got 'disk'"),
        ({"head": "last"}, ValueError, "head must be one of .*got 'last'"),
        ({"keep_attention": 1}, TypeError, "keep_attention must be True or False, got 1"),
        ({"checkpoint": "mlp", "mlp_tile": 0}, ValueError, "mlp_tile must be at least 1 token, got 0"),
        ({"checkpoint": "mlp", "mlp_tile": -5}, ValueError, "mlp_tile must be at least 1 token, got -5"),
        ({"checkpoint": "mlp", "mlp_tile": 2.5}, TypeError, "mlp_tile must be a number of tokens or None, got 2.5"),
        ({"checkpoint": "mlp", "mlp_tile": True}, TypeError, "mlp_tile must be a number of tokens or None"),
        ({"mlp_tile": 5}, ValueError, 'mlp_tile acts on checkpoints: take checkpoint="mlp" or "layer", not "none"'),
        ({"offload": "cpu"}, ValueError, "offload acts on checkpoints"),
    ],
)
def test_plans_refuse(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemoryPlan(**arguments)


@pytest.mark.parametrize("name", ["layer+tile=x", "layer+", "layer+attentions", "mlp+head=explained+3"])
def test_names_of_plans_refuse(name: str) -> None:
    with pytest.raises(ValueError, match=f"memory: .*{name.split('+')[1]}"):
        MemoryPlan.parse(name)
    with pytest.raises(ValueError, match="memory must be a MemoryPlan, 'auto' or one of"):
        MemoryPlan.parse("lean")
    with pytest.raises(ValueError, match="mlp_tile must be at least 1 token, got -4"):
        MemoryPlan.parse("mlp+tile=-4")
    with pytest.raises(ValueError, match="memory must be a MemoryPlan, 'auto' or one of"):
        gim.explain(make("llama"), ids(), baseline_token_id=BASELINE, memory=3)


def test_names_of_plans_are_read_back() -> None:
    for plan in every_plan():
        back = MemoryPlan.parse(plan.name)
        # Where attention is kept in any case, its name does not say so.
        assert back == plan or (plan.checkpoint != "layer" and plan.keep_attention)
        assert back.describe() == plan.describe()
    assert len({plan.describe() for plan in PLANS}) == len(PLANS)
    assert (
        MemoryPlan.parse("layer+offload=cpu") == MemoryPlan.parse("layer+offload") == MemoryPlan("layer", offload="cpu")
    )
    assert MemoryPlan("layer", offload="cpu").describe(pinned=False).endswith("offloaded to ordinary memory")


def test_offload_without_a_gpu_says_that_it_is_ordinary_memory() -> None:
    found = memory.run(*request(make("llama")), memory="layer+offload", progress=None)
    assert found.memory == "a checkpoint at each layer, checkpoints offloaded to ordinary memory"


class Mixer(nn.Module):
    """No MLP: it mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(48, 8), nn.Linear(8, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).cumsum(1).tanh())


class Experts(nn.Module):
    """Two MLPs, one for each half of the tokens' first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[..., :1] > 0, self.experts[0](x), self.experts[1](x))


@pytest.mark.parametrize(
    ("part", "reason"), [(Mixer, "no child that maps each token"), (Experts, "mixture of experts")]
)
def test_layers_whose_mlp_cannot_run_in_parts_are_named(part: Callable[[], nn.Module], reason: str) -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    model.model.layers[1].mlp = part().double()
    want = explain(model, tokens, EVERYTHING)
    for name in ("mlp", "layer+tile=5"):
        plan = MemoryPlan.parse(name)
        with pytest.raises(ValueError, match=rf"does not apply to model\.layers\.1 \(LlamaDecoderLayer\): .*{reason}"):
            explain(model, tokens, plan)
    for name in ("none", "layer", "layer+attention+offload"):
        close(explain(model, tokens, MemoryPlan.parse(name)), want, name)
    model.model.layers[2].mlp = part().double()  # in the last layer, all its tokens run
    want = explain(model, tokens, EVERYTHING)
    for name in ("none", "layer"):
        close(explain(model, tokens, MemoryPlan.parse(name)), want, name)


def test_a_model_without_layers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    found = anatomy.of(model)
    monkeypatch.setattr("gim.checkpoint.anatomy.of", lambda _: dataclasses.replace(found, layers=()))
    with pytest.raises(
        ValueError, match=r"memory='layer' needs a list of layers, and LlamaForCausalLM has no ModuleList"
    ):
        explain(model, ids(1, 5), MemoryPlan("layer"))


def test_attention_that_runs_more_often_again_is_named() -> None:
    model, calls = make("llama"), []
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def more(*given: Any, **named: Any) -> Any:
        calls.append(1)
        out = forward(*given, **named)
        return out if len(calls) == 1 else forward(*given, **named)

    attention.forward = more
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.layers\.1: the layer does not do the same .* Attention ran 1 times",
    ):
        explain(model, ids(1, 5), MemoryPlan("layer", True, head="all"))


def test_a_layer_that_does_not_repeat_itself_is_named() -> None:
    model, calls = make("llama"), []

    def once(_: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return y * y.sigmoid() if len(calls) == 1 else y

    model.model.layers[1].self_attn.o_proj.register_forward_hook(once)
    before = state(model)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1: the layer does not do the same .*memory='layer'"
    ):
        explain(model, ids(1, LENGTH), MemoryPlan("layer"))
    assert state(model) == before


@by_plans
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_the_user_enabled_are_respected_and_restored(
    reentrant: bool, plans: Sequence[MemoryPlan], calls: list[tuple[int, bool]]
) -> None:
    model, tokens = make("llama"), ids(1, LENGTH)
    want = explain(model, tokens, EVERYTHING)
    enable_checkpoints(model, {"use_reentrant": reentrant})
    model.train()
    before = state(model)
    for plan in plans:
        calls.clear()
        close(explain(model, tokens, plan), want, plan.name)
        again = sum(is_again for _, is_again in calls)
        # A plan's own checkpoints take the place of the user's: never both.
        runs_again = plan.checkpoint == "layer" and not plan.keep_attention
        # The last layer runs for the explained positions alone, and not again; else it is one like the others.
        assert again == (0 if not runs_again else 3 if plan.head == "all" else 2), plan.name
        assert state(model) == before
    assert model.is_gradient_checkpointing and model.training


def test_auto_keeps_no_more_than_the_users_checkpoints_would() -> None:
    model = make("llama").train()
    enable_checkpoints(model)
    assert memory.choose(model, ids(1, LENGTH)).checkpoint == "layer"


def _request(model: Any, length: int = LENGTH) -> scoring.Request:
    tokens, mask = check_ids(model, ids(1, length), None)
    positions = torch.tensor([[length - 1]])
    terms = scoring.Terms(positions, torch.full_like(positions, 7), torch.ones_like(positions), "logit")
    return scoring.Request.of(tokens, mask, terms)


def request(model: Any, length: int = LENGTH) -> tuple[Any, ...]:
    """The first arguments of :func:`gim.memory.run`."""
    found = _request(model, length)
    return model, found.rows.ids, found.rows.mask, found.scored, BASELINE, gim.rules.GIM


def test_prompts_beyond_the_position_limit_are_refused() -> None:
    model, tokens = make("llama", torch.float32), ids(1, 513)
    message = r"the prompt has 513 tokens, and LlamaForCausalLM has 512 positions .*--allow-extrapolation"
    with pytest.raises(ValueError, match=message):
        gim.explain(model, tokens, baseline_token_id=BASELINE)
    assert gim.explain(model, tokens, baseline_token_id=BASELINE, allow_extrapolation=True).shape == (513,)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0  # padding takes no position
    assert gim.explain(model, tokens, baseline_token_id=BASELINE, attention_mask=mask).shape == (513,)


# ---- auto, and running out


@pytest.mark.slow
def test_auto_takes_the_fastest_plan_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", torch.float32)
    length = 400
    plans = [plan for plan in PLANS if plan.offload == "none"]
    estimates = gim.estimate_memory(model, length, plans=plans)
    want = gim.explain(model, ids(1, length), baseline_token_id=BASELINE, memory="none")
    for limit in sorted({estimate.activations for estimate in estimates}):
        free = int(limit / memory.AUTO_SHARE) + 1
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        fitting = [one for one in estimates if one.activations <= memory.AUTO_SHARE * free]
        chosen = memory.choose(model, ids(1, length))
        best = min(one.relative_cost for one in fitting)
        assert next(one for one in estimates if one.plan == chosen).relative_cost == best
        got = gim.explain(model, ids(1, length), baseline_token_id=BASELINE)
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-5)
    found = memory.run(*request(model, length), memory="auto", progress=None)
    assert found.memory == "every activation kept, chosen by auto"


@pytest.mark.slow
def test_a_prompt_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", torch.float32)
    least = min(one.activations for one in gim.estimate_memory(model, 400))
    monkeypatch.setattr(memory, "free_bytes", lambda _: least // 2)
    with pytest.raises(
        gim.OutOfMemoryError, match=r"no memory plan fits .*400 tokens; plan layer.* is estimated"
    ) as caught:
        gim.explain(model, ids(1, 400), baseline_token_id=BASELINE)
    assert caught.value.longest is not None and 100 < caught.value.longest < 400
    assert f"would fit has about {caught.value.longest:,} tokens" in str(caught.value)
    with pytest.raises(gim.OutOfMemoryError, match=r"memory='none' cannot fit this prompt"):
        gim.explain(model, ids(1, 400), baseline_token_id=BASELINE, memory="none")
    # What the error promises holds.
    gim.explain(model, ids(1, caught.value.longest), baseline_token_id=BASELINE)


run_out = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[MemoryPlan]:
    """The plans that are tried, of which the first few run out of memory."""
    tried: list[MemoryPlan] = []
    original = scoring.passes

    def passes(model: Any, asked: Any, baseline: int, plan: MemoryPlan, **named: Any) -> Any:
        if named.get("check", True):  # not a dry run
            tried.append(plan)
            if len(tried) <= times:
                raise error
        return original(model, asked, baseline, plan, **named)

    monkeypatch.setattr(scoring, "passes", passes)
    return tried


@functools.cache
def _small() -> Any:
    return make("llama", torch.float32)


_estimate = functools.cache(Twin.estimate)


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One model for all, of which each estimate is made once."""
    monkeypatch.setattr(Twin, "estimate", _estimate)
    return _small()


@run_out
def test_running_out_is_caught_once(estimated: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = estimated
    before, tried = state(model), failing(monkeypatch, error, 1)
    with pytest.warns(UserWarning, match="out of memory under plan none; trying plan mlp"):
        got = memory.run(*request(model), memory="auto", progress=None)
    assert tried == [MemoryPlan("none"), got.plan] and got.plan.checkpoint == "mlp"
    assert state(model) == before


@pytest.mark.slow
@run_out
def test_running_out_twice_says_what_would_fit(
    estimated: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = estimated
    before, tried = state(model), failing(monkeypatch, error, 2)
    with warnings.catch_warnings(), pytest.raises(gim.OutOfMemoryError, match="out of memory twice") as caught:
        warnings.simplefilter("ignore")
        memory.run(*request(model), memory="none", progress=None)
    assert len(tried) == 2 and caught.value.plan == tried[1]
    assert caught.value.estimate is not None and caught.value.longest is not None
    assert "is estimated to take" in str(caught.value) and "the longest prompt that would fit has about" in str(
        caught.value
    )
    tried = failing(monkeypatch, error, 1)
    leanest = min(gim.estimate_memory(model, LENGTH), key=lambda one: one.activations).plan
    with pytest.raises(gim.OutOfMemoryError, match="out of memory"):
        memory.run(*request(model), memory=leanest, progress=None)
    assert tried == [leanest]
    assert state(model) == before


def test_other_errors_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(*_: Any, **__: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(scoring, "passes", passes)
    with pytest.raises(RuntimeError, match="^something else$"):
        gim.explain(make("llama"), ids(), baseline_token_id=BASELINE)


def test_the_tile_of_the_plans_is_one_number() -> None:
    assert {plan.mlp_tile for plan in PLANS} == {None, MLP_TILE}
