"""Code that ``torch.compile`` was given runs as it was written, and follows the rules."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import eval_frame
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

import gim
from gim.rules import get as get_rules
from tests.first import first
from tests.oracle import assert_close64

WIDTH, HEADS, VOCABULARY = 32, 4, 40
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [21, 3, 2, 9, 8, 30, 4, 31, 5, 6, 1, 0, 14]])
TOKENS = IDS.shape[1]


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.abs().max() > 0
    assert_close64(got, want, "the gradient")


def _compiled(one: Any, **named: Any) -> Any:
    return torch.compile(one, backend="eager", **named)


def _layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def _layers_wrapped(model: Any) -> Any:
    model.model.layers = nn.ModuleList([_compiled(layer) for layer in model.model.layers])
    return model


def _forward(model: Any) -> Any:
    model.forward = _compiled(model.forward)
    return model


def _in_place(model: Any) -> Any:
    model.compile(backend="eager", fullgraph=True)
    return model


def _inner(model: Any) -> Any:
    model.model = _compiled(model.model, dynamic=True)
    return model


def _parts(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp, layer.input_layernorm = _compiled(layer.mlp), _compiled(layer.input_layernorm)
    return model


COMPILED: dict[str, Callable[[Any], Any]] = {
    "the model": _compiled,
    "as one graph": lambda model: _compiled(model, fullgraph=True),
    "in place": _in_place,
    "its forward": _forward,
    "its layers": _layers,
    "its layers, wrapped": _layers_wrapped,
    "what is below the head": _inner,
    "its parts": _parts,
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    assert type(eval_frame._stance) is eval_frame.DynamoStance and eval_frame._stance.stance == "default"


def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **shape)).double().eval()


@pytest.mark.parametrize("warm", first((False, True), (False,)))
@pytest.mark.parametrize(
    ("what", "plan"),
    first(
        itertools.product(COMPILED, ("none", "layer", "mlp+tile=4")),
        lambda what, plan: plan == "none" or what == "its layers",
    ),
)
def test_a_compiled_model_is_explained_as_it_was_written(what: str, plan: str, warm: bool) -> None:
    model = llama()
    want = gim.explain(model, IDS, baseline_token_id=0, memory="none")
    compiled = COMPILED[what](model)
    if warm:
        before = compiled(IDS).logits
    for _ in range(2):  # watched, and not
        near(gim.explain(compiled, IDS, baseline_token_id=0, memory=plan), want)
    if warm:
        assert torch.equal(compiled(IDS).logits, before)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("part", ["attention", "norm", "gate"])
def test_functions_that_are_compiled_are_reached(part: str, fullgraph: bool) -> None:
    class Layer(nn.Module):
        def __init__(self, functions: dict[str, Any]) -> None:
            super().__init__()
            self.qkv, self.up = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
            self.down = nn.Linear(WIDTH, WIDTH)
            self.functions = functions

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.functions["norm"](x)).chunk(3, -1)
            x = x + self.functions["attention"](q, k, v)
            g, u = self.up(self.functions["norm"](x)).chunk(2, -1)
            return x + self.down(self.functions["gate"](g, u))

    functions: dict[str, Any] = {
        "attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        "gate": lambda g, u: F.silu(g) * u,
    }
    torch.manual_seed(0)
    layer = Layer(functions).double()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = copy.deepcopy(layer)
    compiled.functions = {**functions, part: _compiled(functions[part], fullgraph=fullgraph)}

    def under(model: nn.Module, rules: Any) -> torch.Tensor:
        with gim.GIM(model, rules=rules) as report:
            y = model(x)
        assert report.complete
        assert report.counts() == {"attention": (1, 1), "norm": (1, 2), "gated_mlp": (1, 1)} or rules != "GIM"
        return torch.autograd.grad(y.square().sum(), x)[0]

    hotter = dataclasses.replace(get_rules("GIM"), temperature=3.0)
    for rules in ("GIM", "GRADIENT", hotter, "GIM_CONSTANT", "GIM"):  # nothing of one is left to another
        near(under(compiled, rules), under(layer, rules))


def test_compiled_code_around_a_model() -> None:
    model = llama()
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return 3 * model(inputs_embeds=x, use_cache=False).logits[:, -1, 3].sum()

    with gim.GIM(model):
        want = torch.autograd.grad(loss(x), x)[0]
    around = _compiled(loss)
    own = torch.autograd.grad(around(x), x)[0]
    with gim.GIM(model):
        near(torch.autograd.grad(around(x), x)[0], want)
    near(torch.autograd.grad(around(x), x)[0], own)
    whole = _compiled(lambda x: 2 * loss(x), fullgraph=True)
    with gim.GIM(model):
        near(torch.autograd.grad(whole(x), x)[0], 2 * want)


def test_the_stance_is_of_the_threads_that_run_a_forward() -> None:
    """Another thread's compiled code stays compiled, and what the user had set is put back."""
    model, graphs = llama(), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    elsewhere = torch.compile(lambda x: x.sin() + 1, backend=backend)

    def inside(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(elsewhere, torch.ones(3)).result()

    handle = model.model.layers[0].register_forward_hook(inside)
    with torch.compiler.set_stance("eager_on_recompile"):
        gim.explain(model, IDS, baseline_token_id=0)
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert not graphs
    gim.explain(model, IDS, baseline_token_id=0)
    assert len(graphs) == 1
    handle.remove()
    with gim.GIM(model):
        ThreadPoolExecutor(1).submit(elsewhere, torch.ones(3, 2)).result()
        assert len(graphs) == 2
        elsewhere(torch.ones(3, 2, 1))
        assert len(graphs) == 2
    elsewhere(torch.ones(3, 2, 1))
    assert len(graphs) == 3


def test_contexts_that_are_dropped_or_closed_in_another_order_put_the_stance_back() -> None:
    models = [llama(), llama()]
    first, second = gim.GIM(models[0]), gim.GIM(models[1])
    first.__enter__()
    second.__enter__()
    assert eval_frame._stance.stance == "force_eager"
    first.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    del second
    assert eval_frame._stance.stance == "default"
    with gim.GIM(models[0]):
        torch.compiler.set_stance("eager_on_recompile")  # and it stays so
        models[0](IDS)
        assert eval_frame._stance.stance == "force_eager"
    assert eval_frame._stance.stance == "eager_on_recompile"
    torch.compiler.set_stance("default")


def test_a_stance_of_the_users_inside_a_context_changes_nothing() -> None:
    model = llama()
    want = gim.explain(model, IDS, baseline_token_id=0)
    model.model.layers[0].mlp.compile(backend="aot_eager")
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    grads: list[torch.Tensor] = []
    for stance in ("default", "force_eager"):
        with gim.GIM(model) as report, torch.compiler.set_stance(stance):
            logits = model(inputs_embeds=x, use_cache=False).logits
        assert report.counts()["gated_mlp"] == (2, 2)
        grads += torch.autograd.grad(logits[:, -1, 3].sum(), x)
    near(*grads)
    near(gim.explain(model, IDS, baseline_token_id=0), want)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_context_inside_of_compiled_code_is_refused(fullgraph: bool) -> None:
    model = llama()

    def inside(x: torch.Tensor) -> torch.Tensor:
        with gim.GIM(model):
            return model(x).logits

    with pytest.raises(RuntimeError, match="cannot be opened in code that torch.compile runs"):
        _compiled(inside, fullgraph=fullgraph)(IDS)
    inside(IDS)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_flex_attention_that_is_compiled(fullgraph: bool) -> None:
    class Attention(nn.Module):
        def __init__(self, call: Any) -> None:
            super().__init__()
            self.call = call

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.call(x, x, x, score_mod=lambda s, b, h, i, j: s + 0.1 * (i - j))

    x = torch.randn(2, HEADS, TOKENS, 8, dtype=torch.float64, requires_grad=True)
    grads: list[torch.Tensor] = []
    for call in (flex_attention, torch.compile(flex_attention, backend="eager", fullgraph=fullgraph)):
        attention = Attention(call)
        with gim.GIM(attention) as report:
            y = attention(x)
        assert report.counts()["attention"] == (1, 1)
        grads += torch.autograd.grad(y.square().sum(), x)
    near(*grads)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_what_would_be_recorded_inside_a_context_is_refused(how: str) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(ids, use_cache=False).logits
            return logits

    model = Logits().eval()
    record = {"trace": torch.jit.trace, "export": lambda m, given: torch.export.export(m, given).module()}[how]
    with gim.GIM(model), pytest.raises(RuntimeError, match=r"cannot record a model inside a GIM context"):
        record(model, (IDS,))
    near(record(model, (IDS,))(IDS), model(IDS))
