"""Contexts over one model in any order: opened, closed, copied, pickled, interrupted; every forward follows its own."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame

import gim
from gim.intercept.gates import Changes
from gim.intercept.session import session_of
from tests import families
from tests.first import first
from tests.oracle import assert_close64

RULES = ("GIM", "GRADIENT", "ATTNLRP", "FREEZE_ONLY", "GIM_CONSTANT", "SCALES_ONLY")
WIDTH = 16


class Small(nn.Module):
    """One of each part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bang = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        if self.bang:
            raise KeyboardInterrupt
        return x + nn.functional.silu(self.gate(x)) * self.up(x)


def make() -> Small:
    torch.manual_seed(0)
    return Small().double().eval()


def gradient(model: nn.Module) -> torch.Tensor:
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).pow(2).sum(), x)
    return grad


def state(model: nn.Module) -> Any:
    """What the modules hold; a copy may hold its class's own ``forward``, which is what it has anyway."""

    def held(module: nn.Module) -> list[str]:
        own = getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward
        assert not own or getattr(module.forward, "__self__", None) is module
        return sorted(name for name in module.__dict__ if not (own and name == "forward"))

    return [(name, type(module), held(module)) for name, module in model.named_modules()]


@pytest.fixture(scope="module")
def wanted() -> dict[str | None, torch.Tensor]:
    """The gradient under each rule, each by a model of its own; None: outside."""
    found: dict[str | None, torch.Tensor] = {None: gradient(make())}
    for rules in RULES:
        with gim.GIM(model := make(), rules=rules):
            found[rules] = gradient(model)
    return found


def sequence(seed: int, wanted: dict[str | None, torch.Tensor]) -> None:
    draw, model = random.Random(seed), make()
    before = state(model)
    contexts: list[tuple[str, gim.GIM]] = []
    copies: list[nn.Module] = []
    for _ in range(draw.randint(3, 12)):
        step = draw.choice(("open", "open", "close", "run", "copy", "pickle", "raise", "drop"))
        if step == "open":
            rules = draw.choice(RULES)
            contexts.append((rules, gim.GIM(model, rules=rules)))
            contexts[-1][1].__enter__()
        elif step == "close" and contexts:
            contexts.pop(draw.randrange(len(contexts)))[1].__exit__(None, None, None)
        elif step == "drop" and contexts:
            contexts.pop(draw.randrange(len(contexts)))  # nobody closes it
            gc.collect(0)
        elif step == "copy":
            copies.append(copy.deepcopy(model))
        elif step == "pickle":
            copies.append(pickle.loads(pickle.dumps(model)))
        elif step == "raise":
            model.bang = True
            with pytest.raises(KeyboardInterrupt):
                gradient(model)
            model.bang = False
        inside = contexts[-1][0] if contexts else None
        assert_close64(gradient(model), wanted[inside], f"{seed}: {step}")
        for one in copies[-1:]:
            assert torch.equal(gradient(one), wanted[None]), f"{seed}: a copy follows a rule"
    while contexts:
        contexts.pop(draw.randrange(len(contexts)))[1].__exit__(None, None, None)
    assert torch.equal(gradient(model), wanted[None])
    assert state(model) == before
    assert all(state(one) == before for one in copies)
    for one in copies[-1:]:
        with gim.GIM(one, rules="GIM"):
            assert torch.equal(gradient(one), wanted["GIM"])
        assert "forward" not in one.norm.__dict__
    assert not torch._C._len_torch_function_stack()
    assert type(eval_frame._stance) is eval_frame.DynamoStance


@pytest.mark.parametrize(
    "seeds", first((range(start, start + 40) for start in range(0, 1000, 40)), (range(40),)), ids=str
)
def test_random_sequences_leave_nothing_behind(seeds: range, wanted: dict[str | None, torch.Tensor]) -> None:
    for seed in seeds:
        sequence(seed, wanted)


def test_tasks_of_one_loop_follow_their_own_contexts(wanted: dict[str | None, torch.Tensor]) -> None:
    model = make()
    before = state(model)

    async def task(rules: str, pause: float) -> None:
        with gim.GIM(model, rules=rules):
            for _ in range(3):
                await asyncio.sleep(pause)
                assert_close64(gradient(model), wanted[rules], rules)

    async def outside() -> None:
        for _ in range(5):
            await asyncio.sleep(0.001)
            assert torch.equal(gradient(model), wanted[None])

    async def all_of_them() -> None:
        await asyncio.gather(*(task(rules, 0.001 * (i + 1)) for i, rules in enumerate(RULES)), outside())

    asyncio.run(all_of_them())
    assert state(model) == before


def test_a_context_that_closes_before_a_plan_leaves_no_gate() -> None:
    """An interrupt may leave the plan's changes to be put back last."""
    model = make()
    before = state(model)
    context = gim.GIM(model)
    context.__enter__()
    changes = Changes(session_of(model))
    changes.replace_forward(model.norm, lambda x: x)
    with gim.GIM(model, rules="GRADIENT"):  # gates what has a gate already no second time
        pass
    context.__exit__(None, None, None)
    changes.close()
    assert state(model) == before


def replica(module: nn.Module) -> nn.Module:
    """As ``nn.parallel.replicate`` makes them."""
    made: nn.Module = module._replicate_for_data_parallel()
    made._parameters = {}
    return made


@pytest.mark.parametrize("shallow", [copy.copy, replica])
@pytest.mark.parametrize("hooks", [False, True])
def test_a_shallow_copy_made_inside_runs_what_it_holds(shallow: Any, hooks: bool) -> None:
    model: Any = make()
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    if hooks:
        model.gate.register_forward_hook(lambda *_: None)
    weight, bias = 2 * model.gate.weight.detach(), torch.ones_like(model.gate.bias)
    want = nn.functional.linear(x, weight, bias)

    def copied() -> nn.Module:
        one = shallow(model.gate)
        one._parameters = {}
        one.weight, one.bias = weight, bias
        return one

    with gim.GIM(model), gim.GIM(model.gate):
        early, late = copied(), copied()
        assert torch.equal(early(x), want)
    for one in (early, late):
        assert torch.equal(one(x), want)
        assert "forward" not in one.__dict__


def test_a_shallow_copy_keeps_a_forward_that_somebody_has_set(wanted: dict[str | None, torch.Tensor]) -> None:
    model: Any = make()
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    model.gate.forward = lambda x: 3 * x
    with gim.GIM(model):
        copied = copy.copy(model.gate)
        assert torch.equal(copied(x), 3 * x)
        model.up.forward = model.gate.forward  # is no copy
        assert torch.equal(model.up(x), 3 * x)
    assert torch.equal(copied(x), 3 * x) and torch.equal(model.up(x), 3 * x)


def test_a_forward_put_back_after_closing_is_the_modules_own(wanted: dict[str | None, torch.Tensor]) -> None:
    model: Any = make()
    before = state(model)
    with gim.GIM(model):
        own = model.norm.forward
        model.norm.forward = lambda x: own(x)
    assert torch.equal(gradient(model), wanted[None])
    with gim.GIM(model, rules="GIM"):  # the gate that is gone stands behind
        assert_close64(gradient(model), wanted["GIM"], "behind a forward of one's own")
    model.norm.forward = own
    assert torch.equal(gradient(model), wanted[None])
    assert state(model) == before


def test_modules_exchanged_inside_follow_the_rules() -> None:
    def loss(model: Any) -> torch.Tensor:
        torch.manual_seed(0)
        x = torch.randn(1, 5, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits[0, -1, 7], x)
        return grad

    def other() -> Any:
        return families.make("llama", torch.float64, seed=1)

    exchanged = {
        "layers.1": lambda model: model.layers.__setitem__(1, other().model.layers[1]),
        "self_attn": lambda model: setattr(model.layers[1], "self_attn", other().model.layers[1].self_attn),
        "order": lambda model: setattr(model, "layers", nn.ModuleList(reversed(model.layers))),
    }
    for name, exchange in exchanged.items():
        early, late = families.make("llama", torch.float64), families.make("llama", torch.float64)
        exchange(early.model)
        with gim.GIM(early) as want:
            expected = loss(early)
        with gim.GIM(late) as report:
            loss(late)
            exchange(late.model)
            assert_close64(loss(late), expected, name)
        assert report.complete and want.complete
        assert all("forward" not in one.__dict__ for one in late.modules())
        assert type(late.config) is type(early.config)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_config_is_pickled_and_copied_inside_a_forward(protocol: int) -> None:
    model, found = families.make("llama", torch.float64), []

    def hook(*_: Any) -> None:
        assert model.config._attn_implementation == "gim"
        found.extend([pickle.loads(pickle.dumps(model.config, protocol)), copy.copy(model.config)])

    model.model.layers[0].register_forward_hook(hook)
    with gim.GIM(model):
        model(torch.tensor([[1, 2, 3]]))
    assert [type(one) for one in found] == [type(model.config)] * 2
    assert all(one.to_dict() == model.config.to_dict() for one in found)
