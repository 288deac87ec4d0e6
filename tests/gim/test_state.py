"""Code that keeps something between calls, or hands tensors out beside its result, under plans that run it again."""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import gim
from gim import tokenwise
from gim.applied import UnsupportedModelError
from tests.families import ids, make
from tests.first import first
from tests.oracle import FLOAT64_PLAN_RELATIVE, assert_close64

TARGET, BASELINE = 3, 0
LAYERS = ("layer", "layer+attention")
MLPS = ("mlp", "mlp+tile=2", "layer+tile=2", "layer+attention+offload+tile=2")


class Keeping(nn.Module):
    """Another module, whose input is scaled by what this one keeps."""

    def __init__(self, inner: nn.Module, scale: Callable[[Keeping], Any]) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale
        self.register_buffer("average", torch.ones(1))
        self.reset()

    def reset(self) -> None:
        self.calls, self._halved = 0, 1.0
        self.last: torch.Tensor | None = None
        self.history: list[Any] = []
        self.box = {"calls": 0}
        self.seen: set[int] = set()
        self.average = torch.ones(1, dtype=torch.float64)

    def kept(self) -> tuple[Any, ...]:
        return self.calls, self._halved, len(self.history), dict(self.box), set(self.seen), float(self.average)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x * self.scale(self))
        return out


def _count(m: Keeping) -> float:
    m.calls += 1
    return 1 / m.calls


def _private(m: Keeping) -> float:
    m._halved /= 2
    return m._halved


def _list(m: Keeping) -> float:
    m.history.append(None)
    return 1 / len(m.history)


def _dict(m: Keeping) -> float:
    m.box["calls"] += 1
    return 1 / m.box["calls"]


def _set(m: Keeping) -> float:
    m.seen.add(len(m.seen))
    return 1 / len(m.seen)


def _buffer(m: Keeping) -> torch.Tensor:
    m.average = m.average * 0.5
    return m.average


def _tensor(m: Keeping) -> Any:
    before, m.last = m.last, torch.tensor(0.5, dtype=torch.float64)
    return 1.0 if before is None else before


def _in_place(m: Keeping) -> torch.Tensor:
    return m.average.mul_(0.5).clone()


STATES = {one.__name__[1:]: one for one in (_count, _private, _list, _dict, _set, _buffer, _tensor)}


def llama(scale: Callable[[Keeping], Any], at: str) -> tuple[Any, list[Keeping]]:
    model = make("llama", torch.float64)
    made = []
    for layer in model.model.layers:
        made.append(Keeping(getattr(layer, at), scale))
        setattr(layer, at, made[-1])
    return model.eval().requires_grad_(False), made


def explain(model: Any, plan: str) -> torch.Tensor:
    return gim.explain(model, ids(6), target_token_id=TARGET, baseline_token_id=BASELINE, memory=plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    first(
        itertools.product(STATES, (*LAYERS, *MLPS)),
        lambda name, plan: plan == "layer" or (name == "list" and plan in ("layer+attention", "mlp+tile=2")),
    ),
)
def test_a_layer_that_runs_again_finds_what_it_found(name: str, plan: str) -> None:
    model, made = llama(STATES[name], "input_layernorm")
    want = explain(model, "none")
    after = [one.kept() for one in made]
    for one in made:
        one.reset()
    assert_close64(explain(model, plan), want, plan, FLOAT64_PLAN_RELATIVE)
    assert [one.kept() for one in made] == after


@pytest.mark.parametrize("plan", LAYERS)
def test_a_buffer_written_in_place_is_named(plan: str) -> None:
    model, made = llama(_in_place, "input_layernorm")
    message = r"model.layers.2.input_layernorm: its code writes into its average"
    with pytest.raises(UnsupportedModelError, match=message):
        explain(model, plan)
    for one in made:
        one.reset()
    explain(model, "mlp")  # which runs no norm with a state of its own again


@pytest.mark.parametrize("name", ["list", "buffer", "in_place"])
def test_no_module_is_changed_by_a_look_at_it(name: str) -> None:
    """Whether an MLP can run in parts is found by running a copy of it, which writes into nothing of the module."""
    model, made = llama({**STATES, "in_place": _in_place}[name], "mlp")
    before = [one.kept() for one in made]
    with pytest.raises(ValueError, match="no child that maps each token by itself"):
        explain(model, "mlp")
    assert [one.kept() for one in made] == before


def test_a_look_writes_into_no_tensor_that_a_module_holds_however_deep() -> None:
    class Box:
        def __init__(self) -> None:
            self.count = torch.zeros(())

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)
            self.held: Any = [torch.zeros(()), {"inner": (torch.zeros(()),)}, Box()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for one in (self.held[0], self.held[1]["inner"][0], self.held[2].count):
                one.add_(1)
            return torch.as_tensor(self.two(F.silu(self.one(x))))

    mlp = MLP()
    assert isinstance(found := tokenwise.find_mlps(nn.ModuleDict({"mlp": mlp}), 8, torch.float32), list)
    assert [one.name for one in found] == ["mlp"]
    held = mlp.held
    assert [float(one) for one in (held[0], held[1]["inner"][0], held[2].count)] == [0.0, 0.0, 0.0]


class Recording(nn.Module):
    """Another module, whose input is handed out."""

    def __init__(self, inner: nn.Module, out: Any, keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.out, self.keep = inner, out, keep
        self.history: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.out.held = self.keep(x)
        self.history.append(x.detach())
        result: torch.Tensor = self.inner(x)
        return result


class Reading(nn.Module):
    """Another module, to whose input is added what was handed out."""

    def __init__(self, inner: nn.Module, out: Any) -> None:
        super().__init__()
        self.inner, self.out = inner, out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x + self.out.held)
        return result


class Out:
    held: torch.Tensor


def handing_out(at: str, keep: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, Recording]:
    model, out = make("llama", torch.float64), Out()
    first, last = model.model.layers[0], model.model.layers[2]
    recording = Recording(getattr(first, at), out, keep)
    setattr(first, at, recording)
    last.input_layernorm = Reading(last.input_layernorm, out)
    return model.eval().requires_grad_(False), recording


@pytest.mark.parametrize("plan", MLPS)
def test_a_tensor_handed_out_of_an_mlp_that_runs_again_is_named(plan: str) -> None:
    model, _ = handing_out("mlp", lambda x: x * 0.5)
    explain(model, "none")
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp: .* hands out beside its result"):
        explain(model, plan)


HANDED: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], tuple[str, ...]]] = {
    "out of a layer": ("mlp", lambda x: x * 0.5, LAYERS),
    "beside an MLP": ("input_layernorm", lambda x: x * 0.5, (*LAYERS, *MLPS)),
    "a constant": ("mlp", lambda x: x.detach() * 0.5, (*LAYERS, *MLPS)),
}


@pytest.mark.parametrize(
    ("what", "plan"),
    first(
        ((what, plan) for what, (_, _, plans) in HANDED.items() for plan in plans),
        lambda what, plan: plan in ("layer", "mlp+tile=2"),
    ),
)
def test_other_tensors_handed_out_count(what: str, plan: str) -> None:
    at, keep, _ = HANDED[what]
    model, recording = handing_out(at, keep)
    want = explain(model, "none")
    recording.history.clear()
    assert_close64(explain(model, plan), want, plan, FLOAT64_PLAN_RELATIVE)
    assert len(recording.history) == 1


class Told(LlamaDecoderLayer):
    """A layer that reads what the one before it has written down, where no module keeps it."""

    def forward(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> Any:
        before = self.board.get("last") if self.self_attn.layer_idx else None
        self.board["last"] = hidden_states
        given = hidden_states if before is None else hidden_states + before.cumsum(1) / 2
        return super().forward(given, *others, **named)


@pytest.mark.parametrize("plan", ["none", "mlp", "layer", "layer+attention", "layer+tile=2", "layer+head=all"])
def test_layers_that_tell_each_other_by_other_means_are_right_or_named(plan: str) -> None:
    model, board = make("llama"), Board()
    for layer in model.model.layers:
        layer.__class__ = Told
        layer.board = board
    if plan.startswith("layer"):
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.[12]: .* does not do the same"):
            explain(model, plan)
        return
    embedded = model.get_input_embeddings()(ids(6)).detach().requires_grad_()
    with gim.GIM(model):
        logits = model(inputs_embeds=embedded, use_cache=False).logits[:, -1, TARGET]
        (grad,) = torch.autograd.grad(logits.sum(), embedded)
    want = ((embedded - model.get_input_embeddings().weight[BASELINE]) * grad).sum(-1).detach()
    assert_close64(explain(model, plan), want, plan, relative=FLOAT64_PLAN_RELATIVE)


class Board(UserDict[str, Any]):
    """What is written down."""
