"""What a user's hook computes on the way is left alone, and said; the model's own code beside it follows the rules."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from functools import wraps as wraps_of
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gim
import gim.demo
from gim.applied import AppliedReport
from gim_kernels.budget import relative_error
from tests.families import SHARED, ids, make
from tests.first import first
from tests.hooks import Function, ordinary
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

WIDTH, BASELINE = SHARED["hidden_size"], 3
_GATE, _UP = (torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(n)).double() / 4 for n in (1, 2))


class Probe(nn.Module):
    """A module that is none of the model's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(F.layer_norm(x, (WIDTH,)) @ _GATE) * (x @ _UP)


#: What a hook may compute of ``[B, T, WIDTH]``, and the part that it would be in the model's own code.
COMPUTED: dict[str, tuple[Function, str]] = {
    "softmax": (lambda x: x + torch.softmax(x @ x.mT, -1) @ x, "softmax over keys"),
    "torch's attention": (lambda x: x + F.scaled_dot_product_attention(x, x, x), "softmax over keys"),
    "layer norm": (lambda x: F.layer_norm(x, (WIDTH,)), "norm"),
    "norm written out": (lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), "norm"),
    "gate": (lambda x: x + F.silu(x @ _GATE) * (x @ _UP), "gated product"),
    "gate by glu": (lambda x: x + F.glu(torch.cat([x @ _UP, x @ _GATE], -1)), "gated product"),
    "module of one's own": (Probe(), "gated product"),
}


def _after(module: nn.Module, function: Function) -> Any:
    return module.register_forward_hook(lambda _, __, out: function(out))


def _before(module: nn.Module, function: Function) -> Any:
    return module.register_forward_pre_hook(lambda _, inputs: (function(inputs[0]),))


def _always(module: nn.Module, function: Function) -> Any:
    def hook(function: Function, _: nn.Module, inputs: Any, named: Any, out: torch.Tensor) -> torch.Tensor:
        return function(out)

    return module.register_forward_hook(partial(hook, function), with_kwargs=True, always_call=True)


def _everywhere(module: nn.Module, function: Function) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda called, _, out: function(out) if called is module else None
    )


PUT: dict[str, Callable[[nn.Module, Function], Any]] = {
    "after": _after,
    "before": _before,
    "always": _always,
    "everywhere": _everywhere,
}


def gradient(model: nn.Module, rules: str = "GIM") -> tuple[torch.Tensor, AppliedReport]:
    embedded = model.get_input_embeddings()(ids(2, 9)).detach().requires_grad_(True)  # type: ignore[operator]
    with gim.GIM(model, rules=rules) as report:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
    return torch.autograd.grad(logits[:, -1].pow(2).sum(), embedded)[0], report


def put(model: Any, how: str, function: Function, name: str = "model.layers.1.mlp") -> Any:
    return PUT[how](model.get_submodule(name), function)


@pytest.mark.parametrize(
    ("what", "how"),
    first(itertools.product(COMPUTED, PUT), lambda what, how: how == "after" or what == "gate"),
)
def test_a_hook_has_its_ordinary_gradient(what: str, how: str) -> None:
    function, part = COMPUTED[what]
    model = make("llama")
    counts = gradient(model)[1].counts()
    handle = put(model, how, function)
    try:
        got, report = gradient(model)
    finally:
        handle.remove()
    handle = put(model, how, ordinary(function))
    try:
        want, _ = gradient(model)
    finally:
        handle.remove()
    assert_close64(got, want, f"{what} {how}", FLOAT64_MODEL_RELATIVE)
    assert report.counts() == counts and report.complete and report.watched
    assert any(note.startswith(f"{part} in a hook") and "model.layers.1.mlp" in note for note in report.notes)


@pytest.mark.parametrize("what", first(COMPUTED, ("softmax", "norm written out", "gate")))
def test_the_same_in_the_models_own_code_follows_the_rules(what: str) -> None:
    """So the test above can fail."""
    model, (function, _) = make("llama"), COMPUTED[what]
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    handle = put(model, "after", ordinary(function))
    apart, _ = gradient(model)
    handle.remove()
    mlp.forward = lambda x: function(own(x))
    got, report = gradient(model, "GIM")
    assert relative_error(got, apart) > 1e-3
    assert not any("in a hook" in note for note in report.notes)


@pytest.mark.parametrize("memory", first(("none", "layer", "mlp", "layer+tile=4"), ("layer", "layer+tile=4")))
@pytest.mark.parametrize("name", ["model.layers.1", "model.layers.1.mlp"])
def test_a_hook_has_its_ordinary_gradient_under_every_plan(name: str, memory: str) -> None:
    """A plan puts forwards of its own in front of those of layers and MLPs."""
    model, function = make("llama"), COMPUTED["gate"][0]

    def explained(computed: Function) -> torch.Tensor:
        handle = put(model, "after", computed, name)
        scores = gim.explain(model, ids(1, 9), baseline_token_id=BASELINE, memory=memory)
        handle.remove()
        return scores

    assert_close64(explained(function), explained(ordinary(function)), f"{name} {memory}", FLOAT64_MODEL_RELATIVE)


def test_a_module_of_the_model_follows_the_rules_in_a_hook_too() -> None:
    model = make("llama")
    norm = model.model.norm
    handle = put(model, "after", norm)
    got, report = gradient(model, "FREEZE_ONLY")
    handle.remove()

    def frozen(x: torch.Tensor) -> torch.Tensor:
        statistic = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return x * statistic.detach() * norm.weight

    handle = put(model, "after", ordinary(frozen))
    want, other = gradient(model, "FREEZE_ONLY")
    handle.remove()
    assert_close64(got, want, "norm in a hook", FLOAT64_MODEL_RELATIVE)
    assert report.counts()["norm"][1] == other.counts()["norm"][1] + 1
    assert not any("in a hook" in note for note in report.notes)


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_progress_that_raises_leaves_no_hook(calls: int) -> None:
    model, tokenizer = gim.demo.load()
    heard: list[int] = []

    def progress(*_: object) -> None:
        heard.append(1)
        if len(heard) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gim.attribute(model, tokenizer, "The cat", progress=progress)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match="progress must be a function or None, got 5"):
        gim.attribute(model, tokenizer, "The cat", progress=5)  # type: ignore[call-overload]
    gim.attribute(model, tokenizer, "The cat")


def test_an_error_of_progress_is_no_prompts() -> None:
    model, tokenizer = gim.demo.load()
    heard: list[int] = []

    def progress(*_: object) -> None:
        heard.append(1)
        if len(heard) == 2:
            raise ValueError("cancel")

    asked: tuple[dict[str, Any], ...] = ({"answer": " sat"}, {})
    for named in asked:
        heard.clear()
        with pytest.raises(ValueError, match="^cancel$"):
            gim.attribute(model, tokenizer, ["The cat", "A dog that ran"], progress=progress, **named)


def test_circuits_name_what_is_not_finite() -> None:
    from gim import circuits

    model, tokenizer = gim.demo.load()
    text = "The password of Irene is {}. The password of Irene is"
    pair = circuits.Pair(text.format("lantern"), text.format("copper"), " lantern", " copper")
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the first module that puts one out is model\.layers\.1\.mlp\.down"):
        circuits.attribute(model, [pair], tokenizer=tokenizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_full_backward_hooks_change_nothing(family: str) -> None:
    """They stand between a module and its inputs as a function of torch's own."""
    model = make(family, torch.float64)
    want = gim.explain(model, ids(), baseline_token_id=BASELINE)
    heard: list[str] = []
    for name, module in model.named_modules():
        if name and not name.endswith(("self_attn", "attn")):
            module.register_full_backward_hook(lambda *_, name=name: heard.append(name))
    got = gim.explain(model, ids(), baseline_token_id=BASELINE)
    assert heard
    assert_close64(got, want, family, relative=FLOAT64_MODEL_RELATIVE)


def test_a_full_backward_hook_keeps_the_inputs_of_a_module_apart() -> None:
    class Gated(nn.Module):
        def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            return F.silu(gate) * up

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.wide, self.gated = nn.Linear(WIDTH, 2 * WIDTH).double(), Gated()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gated(*self.wide(x).chunk(2, -1))

    model, grads = Model(), []
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        with gim.GIM(model) as report:
            y = model(x)
        assert report.counts()["gated_mlp"] == (1, 1)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
        model.gated.register_full_backward_hook(lambda *_: None)
    assert torch.equal(*grads)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
def test_the_gradient_of_an_activations_output_is_there_for_who_asks(act: nn.Module, zero: bool) -> None:
    """A gate's kernel computes from what the activation was given, past its output."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.act = nn.Linear(8, 12), nn.Linear(8, 12), act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.act(self.gate(x)) * self.up(x))

    model, x = MLP().double(), torch.randn(3, 8, dtype=torch.float64)

    def run(context: Any) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []

        def after(_: nn.Module, __: Any, out: torch.Tensor) -> None:
            out.register_hook(lambda grad: grad * 0) if zero else out.retain_grad()
            kept.append(out)

        given = x.clone().requires_grad_()
        with model.act.register_forward_hook(after), context:
            model(given).sum().backward()
        grads = (given.grad, None if zero else kept[0].grad)
        return [one for one in grads if one is not None]

    want, got = run(nullcontext()), run(gim.GIM(model, rules="GRADIENT"))
    assert len(want) == len(got) == 2 - zero
    for one, other in zip(got, want, strict=True):
        assert_close64(one, other, "outside a context", FLOAT64_MODEL_RELATIVE)


def test_a_forward_that_is_set_inside_is_the_models_code_whatever_it_wraps() -> None:
    """A hook on that module stays a hook."""

    def attributed(wraps: bool, hook: bool) -> tuple[torch.Tensor, AppliedReport]:
        model = make("llama", torch.float64)
        mlp = model.model.layers[1].mlp

        def forward(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
            return out

        x = model.model.embed_tokens(ids(1, 7)).detach().requires_grad_()
        with gim.GIM(model) as report:
            if wraps:
                mlp.forward = wraps_of(mlp.forward)(forward)
            if hook:
                put(model, "after", COMPUTED["gate"][0])
            loss = model(inputs_embeds=x, use_cache=False).logits[0, -1, 7]
        return torch.autograd.grad(loss, x)[0], report

    for hook in (False, True):
        (want, plain), (got, report) = attributed(wraps=False, hook=hook), attributed(wraps=True, hook=hook)
        assert_close64(got, want, f"wrapped, hook={hook}")
        assert report.complete and report.counts() == plain.counts()
