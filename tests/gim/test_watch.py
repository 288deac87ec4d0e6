"""The watch finds, in models written for this file, every part that no rule reaches, and nothing else."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import gim
from gim.applied import AppliedReport, Part, UnsupportedModelError
from gim.intercept import fused, interface, mode, products, torch_attention
from gim.intercept.mode import HANDLERS
from gim.intercept.sites import SITES
from gim.intercept.watch import Finding, Watch
from tests.families import make
from tests.live import peak_bytes

WIDTH, HIDDEN = 16, 24
IDS = torch.tensor([[1, 2, 3, 4, 5]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()  # no operator under a watch wrote it


def _in_place(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = F.silu(gate)
    y *= up
    return y


def _into_a_buffer(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(gate)
    y[..., ::2] = F.silu(gate[..., ::2]) * up[..., ::2]
    y[..., 1::2] = F.silu(gate[..., 1::2]) * up[..., 1::2]
    return y


def _by_function(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return F.silu(g) * u

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return grads[0], grads[0]

    return Product.apply(gate, up)


def _sigmoid_gate(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(g) * u


#: Ways of writing a gate's product.
GATES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda g, u: F.silu(g) * u,
    "up first": lambda g, u: u * F.silu(g),
    "views": lambda g, u: (F.silu(g).unflatten(-1, (4, 6)) * u.unflatten(-1, (4, 6))).flatten(-2),
    "in place": _in_place,
    "sigmoid": lambda g, u: torch.sigmoid(g) * u,
    "relu": lambda g, u: F.relu(g) * u,
    "relu squared": lambda g, u: F.relu(g).square() * u,
    "addcmul": lambda g, u: torch.addcmul(torch.zeros_like(g), F.silu(g), u),
    "by hand": lambda g, u: g * torch.sigmoid(g) * u,
    "by hand, other order": lambda g, u: g * u * torch.sigmoid(g),
    "exp": lambda g, u: g / (1 + torch.exp(-g)) * u,
    "reciprocal": lambda g, u: (1 + torch.exp(-g)).reciprocal() * u,
    "quotient": lambda g, u: u / (1 + torch.exp(-g)),
    "tanh": lambda g, u: 0.5 * g * (1 + torch.tanh(0.79 * (g + 0.04 * g**3))) * u,
    "where": lambda g, u: torch.where(g > 0, g, torch.zeros_like(g)) * u,
    "mask": lambda g, u: g * (g > 0) * u,
    "clamp": lambda g, u: g.clamp(min=0) * u,
    "maximum": lambda g, u: torch.maximum(g, torch.zeros_like(g)) * u,
    "hardswish": lambda g, u: F.hardswish(g) * u,
    "softplus": lambda g, u: F.softplus(g) * u,
    "einsum": lambda g, u: torch.einsum("bti,bti->bti", F.silu(g), u),
    "glu": lambda g, u: F.glu(torch.cat([u, g], -1)),
    "prod": lambda g, u: torch.stack([F.silu(g), u]).prod(0),
    "shifted": lambda g, u: F.silu(g.clamp(max=7)) * (u.clamp(-7, 7) + 1),
    "half of it": lambda g, u: torch.cat([(F.silu(g) * u)[..., :12], g[..., 12:]], -1),
    "channels first": lambda g, u: (F.silu(g).mT * u.mT).mT,
    "buffer": _into_a_buffer,
    "own function": _by_function,
    "log": lambda g, u: torch.log1p(torch.exp(g)) * u,
    "cosine": lambda g, u: torch.cos(g) * u,
    "lerp": lambda g, u: torch.lerp(torch.zeros_like(u), u, torch.sigmoid(g)),
    "lerp to nothing": lambda g, u: torch.lerp(u, torch.zeros_like(u), torch.sigmoid(g)),
    "cumprod": lambda g, u: torch.stack([F.silu(g), u]).cumprod(0)[1],
    "xlogy": lambda g, u: torch.xlogy(u, 1 + torch.exp(g)),
    "compiled": torch.compile(lambda g, u: torch.sigmoid(g) * u, backend="eager"),
}


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


#: Ways of writing a norm.
NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rsqrt": _rms,
    "layer norm": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "length": lambda x: x / x.norm(dim=-1, keepdim=True),
    "products": lambda x: x / torch.sqrt((x * x).sum(-1, keepdim=True)),
    "einsum": lambda x: x * (torch.einsum("btd,btd->bt", x, x) / WIDTH + 1e-6).rsqrt()[..., None],
    "power": lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5,
    "F.normalize": lambda x: F.normalize(x, dim=-1),
    "std": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5),
    "var_mean": lambda x: x / torch.var_mean(x, -1, keepdim=True)[0].sqrt(),
    "absolute": lambda x: x / x.abs().mean(-1, keepdim=True),
    "weight first": lambda x: x * (torch.linspace(0.5, 2, WIDTH) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "squares": lambda x: x / (x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True).square()).sqrt(),
    "renorm": lambda x: torch.renorm(x, 2, 1, 1.0),
}


def _shares(x: torch.Tensor) -> torch.Tensor:
    return x / x.sum(-1, keepdim=True)


def _softmax_by_exp(scores: torch.Tensor) -> torch.Tensor:
    return _shares(torch.exp(scores - scores.amax(-1, keepdim=True)))


#: Ways of writing attention from scores to the values' mix.
SOFTMAXES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": lambda s, v: s.softmax(-1) @ v,
    "exp": lambda s, v: _softmax_by_exp(s) @ v,
    "divided after": lambda s, v: torch.bmm(torch.exp(s), v) / torch.exp(s).sum(-1, keepdim=True),
    "logsumexp": lambda s, v: torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v,
    "log_softmax": lambda s, v: F.log_softmax(s, -1).exp() @ v,
    "in place": lambda s, v: s.exp_().div_(s.sum(-1, keepdim=True)) @ v,
    "float64": lambda s, v: s.double().softmax(-1).float() @ v,
    "exp2": lambda s, v: torch.exp2(s) @ v / torch.exp2(s).sum(-1, keepdim=True),
    "power": lambda s, v: torch.pow(2, s) @ v / torch.pow(2, s).sum(-1, keepdim=True),
    "masked after": lambda s, v: _shares(s.exp() * torch.ones(5, 5).tril()) @ v,
    "masked by bools": lambda s, v: _shares(s.exp() * CAUSAL) @ v,
    "masked by numbers": lambda s, v: torch.exp(s) * CAUSAL.long() @ v / (torch.exp(s) * CAUSAL.long()).sum(-1, True),
    "masked by itself": lambda s, v: _shares(torch.exp(s) * (s > -1e8)) @ v,
    "never divided": lambda s, v: torch.exp(s - s.amax(-1, keepdim=True)) @ v,
    "log-sums alone": lambda s, v: v * s.logsumexp(-1, keepdim=True),
}


class Net(nn.Module):
    """Embedding, norm, one attention by hand, a gated MLP, a head; each part may be left out."""

    def __init__(
        self,
        gate: Callable[..., torch.Tensor] | None = None,
        norm: Callable[..., torch.Tensor] | None = None,
        attend: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = MLP(gate)
        self.head = nn.Linear(WIDTH, 32)
        self.norm, self.attend = norm, attend

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = x if self.norm is None else self.norm(x)
        if self.attend is not None:
            q, k = self.query(x), self.key(x)
            scores = (q @ k.mT) * WIDTH**-0.5
            x = x + self.attend(scores + torch.full((5, 5), -1e9).triu(1), x)
        return self.head(x + self.mlp(x))


class MLP(nn.Module):
    def __init__(self, gate: Callable[..., torch.Tensor] | None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)
        self.product = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.product is None:
            return self.down_proj(F.gelu(self.gate_proj(x)))
        return self.down_proj(self.product(self.gate_proj(x), self.up_proj(x)))


def llama(mlp: nn.Module | None = None, layers: int = 1) -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    if mlp is not None:
        model.model.layers[0].mlp = mlp
    return model


def seen(model: nn.Module, grad: bool = True) -> list[tuple[str, str]]:
    """Kind and module of what the watch finds in a forward without any context."""
    with torch.set_grad_enabled(grad), Watch(dict(model.named_modules()), given=[IDS]) as watch:
        model(IDS)
    assert all(one.place.endswith(".py") or ".py:" in one.place for one in watch.found)
    return [(one.kind, one.module) for one in watch.found]


# What is found


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("way", GATES)
def test_every_way_of_writing_a_gate_is_found(way: str, grad: bool) -> None:
    found = seen(Net(gate=GATES[way]), grad)
    assert set(found) == {("gated product", "mlp")}
    # A buffer is filled in two products.
    assert len(found) == (2 if way == "buffer" else 1)


@pytest.mark.parametrize("way", NORMS)
def test_every_way_of_writing_a_norm_is_found(way: str) -> None:
    assert seen(Net(norm=NORMS[way])) == [("norm", "Net")]
    assert seen(Net(norm=NORMS[way]), grad=False) == [("norm", "Net")]


@pytest.mark.parametrize("way", SOFTMAXES)
def test_every_way_of_writing_a_softmax_over_keys_is_found(way: str) -> None:
    grad = way != "in place"  # which autograd would refuse
    assert seen(Net(attend=SOFTMAXES[way]), grad) == [("softmax over keys", "Net")]


def _scripted_norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("runs", [0, 1, 2, 3])
@pytest.mark.parametrize("part", ["gate", "norm"])
def test_scripted_functions_are_found_however_often_they_ran_before(part: str, runs: int) -> None:
    """After two runs TorchScript computes on detached tensors, and gives the results a gradient of its own."""
    function = torch.jit.script(_sigmoid_gate if part == "gate" else _scripted_norm)
    x = torch.randn(1, 5, HIDDEN if part == "gate" else WIDTH, requires_grad=True)
    for _ in range(runs):
        torch.autograd.grad((function(x, x) if part == "gate" else function(x)).sum(), x)
    found = seen(Net(gate=function) if part == "gate" else Net(norm=function))
    assert found == [("gated product", "mlp") if part == "gate" else ("norm", "Net")]


def test_what_is_a_constant_to_what_follows_is_not_found() -> None:
    def constant(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gated = F.silu(g) * u
        by_hand = F.silu(g.detach()) * u.detach()
        by_hand += u  # which has a gradient, and what it is added to has none
        return by_hand + (gated - u).detach() + gated.clone().requires_grad_() * 0

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x + (_rms(x.detach()) - x).detach()

    assert seen(Net(gate=constant, norm=normed)) == []


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_of_learned_queries_is_found(frozen: bool) -> None:
    """As a Perceiver's: one of the two that are multiplied is a weight, and it is not a map's."""

    class Latents(Net):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(5, WIDTH))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            return self.head((self.latents @ self.key(x).mT * 0.25).softmax(-1) @ x)

    class Router(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            experts = torch.stack([self.query(x), self.key(x)], -2)
            return self.head((self.head(x)[..., None, :2].softmax(-1) @ experts).squeeze(-2))

    model = Latents()
    model.latents.requires_grad_(not frozen)
    assert seen(model) == [("softmax over keys", "Latents")]
    assert seen(Router()) == []


def test_inference_mode_hides_nothing() -> None:
    """Operators made of others come whole there."""
    model = Net(gate=GATES["glu"], norm=lambda x: F.layer_norm(x, (WIDTH,)), attend=SOFTMAXES["softmax"])
    with torch.inference_mode():
        found = seen(model, grad=False)
    assert found == [("norm", "Net"), ("softmax over keys", "Net"), ("gated product", "mlp")]


def test_a_recurrent_layer_holds_gates_that_cannot_be_seen() -> None:
    recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
    model = Net(norm=lambda x: recurrent(x)[0])
    assert [kind for kind, _ in seen(model)] == ["opaque operator"]


@pytest.mark.parametrize(
    "score",
    [
        lambda q, k: (q[:, :, None] * k[:, None]).sum(-1),
        lambda q, k: -(q[:, :, None] - k[:, None]).square().sum(-1),
        lambda q, k: torch.tanh(q[:, :, None] + k[:, None]).mean(-1),
        lambda q, k: -torch.cdist(q, k),
    ],
    ids=["products", "distances", "sums", "cdist"],
)
def test_each_of_one_axis_with_each_of_another_are_scores(score: Callable[..., torch.Tensor]) -> None:
    class Sums(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            return self.head(score(self.query(x), self.key(x)).softmax(-1) @ x)

    assert seen(Sums()) == [("softmax over keys", "Sums")]


@pytest.mark.parametrize("where", ["hugging face", "plain"])
@pytest.mark.parametrize("way", GATES)
def test_no_gate_is_silent_in_a_context(way: str, where: str) -> None:
    """Applied, or refused by the name of its module."""
    net = Net(gate=GATES[way], attend=None)
    model = llama(net.mlp) if where == "hugging face" else net
    rules = gim.rules.Rules("exact", 1.0, False, 1.0, 1.0, 1.0, 0.5, 0.5)
    try:
        with gim.GIM(model, rules=rules) as report:
            model(IDS)
    except UnsupportedModelError as error:
        assert "mlp: " in str(error)
    else:
        assert report.counts()["gated_mlp"] == (1, 1) and report.watched


# What is not


def test_what_is_no_gate_is_not_found() -> None:
    class Others(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            places = torch.arange(5.0)[:, None] * torch.logspace(0, -2, WIDTH)
            x = x * places.cos() + x.roll(1, -1) * places.sin()  # rotary
            g = self.query(x)
            x = x + 0.5 * g * (1 + torch.erf(g / 2**0.5))  # an activation by hand
            x = x + torch.sigmoid(self.key(x)[..., :1]) * x.detach()
            x = x * torch.sigmoid(x)
            router = self.key(x).softmax(-1)
            router = router / router.sum(-1, keepdim=True)
            x = x + router[..., :1] * self.query(x)
            x = x * (input_ids > 2)[..., None]  # a mask
            kept = x - x.mean(-1, keepdim=True)
            return self.head(30 * torch.tanh(kept / 30))

    model = Others()
    with Watch(dict(model.named_modules()), given=[IDS]) as watch:
        model(IDS)
    assert not watch.found
    assert {one.kind for one in watch.noted} == {"one factor for a row"}


def test_a_gate_of_attentions_output_is_noted() -> None:
    class Gated(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            q = self.query(x)[:, None]
            mixed = F.scaled_dot_product_attention(q, q, q)[:, 0]
            return self.head(mixed * torch.sigmoid(self.key(x)))

    model = Gated()
    with gim.GIM(model) as report:
        model(IDS)
    assert any(note.startswith("gate of a mixer's output (mul, test_watch.py:") for note in report.notes)


@pytest.mark.parametrize(
    ("product", "noted"),
    [
        (lambda g, u: g * u, "product of branches, none of them bent (mul"),
        (lambda g, u: (torch.diag_embed(F.silu(g)) @ u[..., None])[..., 0], "matrix product of branches, one of them"),
        (lambda g, u: F.bilinear(F.silu(g), u, torch.ones(HIDDEN, HIDDEN, HIDDEN)), "matrix product of branches, one"),
        (lambda g, u: torch.exp(g.sigmoid().log() + u.abs().log()), "branches that meet in a function (exp of a sum"),
        (lambda g, u: torch.logaddexp(g, u), "branches that meet in a function (logaddexp"),
        (lambda g, u: (g.mean(-1)[:, None].softmax(-1) @ u).expand_as(u), "a mix by a softmax of no scores (bmm"),
        (lambda g, u: _shares(F.relu(g @ u.mT) + 1) @ u, "attention that is no"),
    ],
    ids=["bilinear", "diagonal", "F.bilinear", "logs", "function", "pooling", "shares"],
)
def test_what_is_no_part_by_its_definition_is_noted(product: Any, noted: str) -> None:
    model = llama(MLP(product), layers=2)  # whose other layer has a gated MLP
    with gim.GIM(model) as report:
        model(IDS)
    assert report.complete and any(note.startswith(noted) for note in report.notes), report.notes


def test_a_detached_branch_is_a_constant() -> None:
    assert seen(Net(gate=lambda g, u: F.silu(g).detach() * u)) == []
    assert seen(Net(norm=lambda x: x / x.norm(dim=-1, keepdim=True).detach())) == []


def test_what_is_computed_without_gradients_is_a_constant() -> None:
    """For show, or to be a factor; in the forward of an autograd function it is none."""

    def shown(part: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def beside(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                part(x, *others)
            return x

        return beside

    assert seen(Net(norm=shown(_rms), gate=shown(GATES["silu"]))) == []
    assert seen(Net(gate=GATES["own function"])) == [("gated product", "mlp")]


# Operators and tensors out of sight


def test_another_librarys_operator_is_named() -> None:
    @torch.library.custom_op("watchtests::swiglu", mutates_args=())
    def swiglu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return F.silu(g) * u

    swiglu.register_autograd(lambda ctx, grad: (grad, grad))
    model = llama(MLP(swiglu))
    where = r"layers\.0\.mlp: opaque operator \(watchtests::swiglu, .*\.py:"
    with pytest.raises(UnsupportedModelError, match=where), gim.GIM(model):
        model(IDS)


def test_tensors_written_out_of_sight_are_named() -> None:
    def through_numpy(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(g.detach().numpy() * u.detach().numpy())

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return grads[0], grads[0]

        return Product.apply(g, u)

    def into_blank(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(g)
        out.numpy()[...] = g.detach().numpy()
        return out + u

    def on_another_thread(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:  # whose nodes are counted from 0
            return pool.submit(lambda: F.silu(g) * u).result()

    model = Net(gate=on_another_thread)
    assert seen(model) == [("tensor written out of sight", "mlp.down_proj")]
    with pytest.raises(UnsupportedModelError, match="or on another thread"), gim.GIM(model):
        model(IDS)
    # A weight that was computed before, on a thread of its own, is a weight.
    plain = Net()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(lambda: (2 * plain.mlp.down_proj.weight).detach().requires_grad_() * 1.0).result()
    del plain.mlp.down_proj.weight
    plain.mlp.down_proj.weight = made
    assert seen(plain) == []

    # The module that reads it is named: nobody is seen to write it.
    assert seen(Net(gate=through_numpy)) == [("tensor written out of sight", "mlp.down_proj")]
    assert seen(Net(gate=into_blank)) == [("tensor written out of sight", "mlp")]


def test_what_a_function_of_ones_own_keeps_on_its_node_is_not_the_graphs() -> None:
    class Named(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.name, ctx.variable = "mine", torch.ones(3)
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    grads: list[torch.Tensor] = []
    for own in (Named.apply, lambda x: x):
        model = Net(
            norm=lambda x, own=own: F.layer_norm(own(x), (WIDTH,)), gate=lambda g, u, own=own: F.silu(own(g)) * own(u)
        ).double()
        with gim.GIM(model) as report:
            out = model(IDS)
        assert report.counts() == {"attention": (0, 0), "norm": (1, 1), "gated_mlp": (1, 1)}
        grads += torch.autograd.grad(out[0, -1, 3], model.embed.weight)
    assert torch.equal(*grads)


def test_flex_attention_is_found() -> None:
    class Flex(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            q = self.query(self.embed(input_ids))[:, None]
            return self.head(flex_attention(q, q, q)[:, 0])

    with gim.GIM(nn.Identity()):  # it compiles itself elsewhere, which no watch survives
        assert seen(Flex(), grad=False) == [("softmax over keys", "Flex")]


# Dropout


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_by_a_function_is_refused_where_it_acts(p: float, training: bool) -> None:
    model = Net(norm=lambda x: F.dropout(F.layer_norm(x, (WIDTH,)), p, training))
    acts = p > 0 and training
    refused = pytest.raises(UnsupportedModelError, match=r"Net: drops out numbers \(p=0\.5\)")
    with refused if acts else nullcontext(), gim.GIM(model, rules="FREEZE_ONLY"):
        model(IDS)


# Every mechanism, taken away


def _without(monkeypatch: pytest.MonkeyPatch, *functions: Any) -> None:
    for function in functions:
        monkeypatch.delitem(HANDLERS, function)


class Torch(nn.Module):
    """All that torch's own functions offer: attention twice, norms, gates."""

    def __init__(self, part: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.part = nn.Embedding(32, WIDTH), part
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.wide, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        q = self.wide(x)[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]
        x = x + self.attend(x, x, x, need_weights=self.part == "weights")[0]
        x = F.layer_norm(x, (WIDTH,), self.weight)
        x = F.rms_norm(x, (WIDTH,), self.weight)
        return F.silu(self.wide(x)) * self.wide(x + 1) + F.gelu(self.wide(x + 2)) * self.wide(x + 3)


TAKEN_AWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "sdpa": ((F.scaled_dot_product_attention,), "softmax over keys"),
    "mha": ((F.multi_head_attention_forward,), "softmax over keys"),
    "layer_norm": ((F.layer_norm, torch.layer_norm), "norm"),
    "rms_norm": ((F.rms_norm, torch.rms_norm), "norm"),
    "products": (tuple(products.PRODUCTS), "gated product"),
}


@pytest.mark.parametrize("what", TAKEN_AWAY)
def test_without_a_handler_a_plain_model_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Torch(what).eval()
    with gim.GIM(model) as report:
        model(IDS)
    assert report.watched and report.complete
    functions, kind = TAKEN_AWAY[what]
    _without(monkeypatch, *functions)
    model = Torch(what).eval()
    with pytest.raises(UnsupportedModelError, match=rf"{kind} \(.*\), which no rule has reached"), gim.GIM(model):
        model(IDS)


def test_attention_weights_beside_the_output_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Torch("weights").eval()
    with gim.GIM(model) as report:
        model(IDS)
    assert report.complete and report.watched
    monkeypatch.setattr(torch_attention, "weights_of", lambda q, k, *_, **__: torch.softmax(q @ k.mT, -1))
    model = Torch("weights").eval()
    with pytest.raises(UnsupportedModelError, match="softmax over keys"), gim.GIM(model):
        model(IDS)


@pytest.mark.parametrize("what", ["products", "attention"])
def test_without_a_handler_a_hugging_face_model_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms and gates are written out; its attention is torch's, where its interface is not told another."""
    monkeypatch.setattr(fused, "ENABLED", False)
    if what == "attention":
        _without(monkeypatch, F.scaled_dot_product_attention)
        monkeypatch.setattr(interface, "prepare", lambda modules, stack: None)
    else:
        _without(monkeypatch, *products.PRODUCTS)
    kinds = ["softmax over keys"] if what == "attention" else ["norm", "gated product"]
    with pytest.raises(UnsupportedModelError) as error, gim.GIM(model := llama()):
        model(IDS)
    assert all(re.search(rf"{kind} \(.*\), which no rule has reached", str(error.value)) for kind in kinds)


def test_products_that_run_in_plain_torch_are_reached_by_what_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss's activation is none that the kernels have."""
    monkeypatch.setattr(SITES, "acting", lambda rule: nullcontext())
    model = make("gpt-oss", torch.float32)
    with pytest.raises(UnsupportedModelError, match="gated product"), gim.GIM(model):
        model(IDS)


def test_code_that_runs_in_no_forward_is_said() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 8)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.inner(x).chunk(2, -1)
            return torch.sigmoid(gate) * up

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encode(x)

    model, x = Encoder(), torch.ones(2, 4, requires_grad=True)
    with gim.GIM(model) as report:
        model.encode(x)
    assert any("no forward of Encoder itself ran" in note for note in report.notes)
    with gim.GIM(model) as report:
        model(x)
    assert not any("itself ran" in note for note in report.notes) and report.counts()["gated_mlp"] == (1, 1)


@pytest.mark.parametrize("part", ["norm", "softmax over keys", "gated product"])
def test_a_module_that_is_called_from_outside_is_watched_too(part: str) -> None:
    """A backbone without its head, one layer after the other."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if part == "norm":
                return Own.apply(x, lambda one, _: NORMS["rsqrt"](one))
            if part == "gated product":
                return Own.apply(self.wide(x), lambda one, other: F.silu(one) * other, self.wide(x + 1))
            return SOFTMAXES["exp"](x @ self.wide(x).mT, x)

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, how: Any, y: torch.Tensor | None = None) -> torch.Tensor:
            return how(x, y)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            return grads[0], None, None

    model = nn.ModuleDict({"inner": Inner(), "plain": nn.Linear(WIDTH, WIDTH)})
    x = torch.randn(1, 5, WIDTH, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match=rf"inner: {part} \("), gim.GIM(model):
        model["inner"](x)
    with gim.GIM(model) as report:
        model["plain"](x)
    assert report.watched and report.forwards == 0 and len(report.notes) == 1 and "ModuleDict itself" in report.notes[0]


def test_a_rule_that_is_off_wants_nothing() -> None:
    model = Net(gate=GATES["by hand"], norm=NORMS["rsqrt"], attend=SOFTMAXES["exp"])
    with gim.GIM(model, rules="GRADIENT") as report:
        model(IDS)
    assert report.complete and report.watched
    with gim.GIM(model, strict=False) as report:
        model(IDS)
    assert [reason.split(" (")[0] for _, reason in report.unsupported] == ["softmax over keys"]


def test_handlers_that_take_all_code_for_a_hooks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mode, "hooked", lambda: True)
    with pytest.raises(UnsupportedModelError, match="no rule has reached"), gim.GIM(model := llama(layers=2)):
        model(IDS)


# Sites


def test_what_a_rule_computes_is_no_finding_of_its_own_part_alone() -> None:
    def acting(part: Part) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def gate(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            with SITES.acting(part):
                return F.silu(_rms(g)) * u

        return gate

    assert seen(Net(gate=acting("gated_mlp"))) == [("norm", "mlp")]
    assert seen(Net(gate=acting("norm"))) == [("gated product", "mlp")]


def test_sites_are_each_threads_own() -> None:
    told: list[bool] = []
    with SITES.acting("norm"):
        thread = threading.Thread(target=lambda: told.append(SITES.acts("norm")))
        thread.start()
        thread.join()
        told.append(SITES.acts("norm"))
    assert told == [False, True]


# What the watch does not do


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt-oss", "modernbert"])
def test_the_watch_changes_no_number(family: str) -> None:
    model = make(family, torch.float32)
    ids = torch.arange(4, 30)[None]

    def explain() -> torch.Tensor:
        return gim.explain(model, ids, target_token_id=5, target_position=5, baseline_token_id=1)

    watched, unwatched = explain(), explain()
    assert torch.equal(watched, unwatched)


def test_the_watch_holds_nothing_alive() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def product(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(g.detach())
        held.append(weakref.ref(y.untyped_storage()))
        held.append(weakref.ref(y))
        del y
        alive.append(sum(one() is not None for one in held[1:]))
        return g + u

    seen(Net(gate=product))
    assert alive == [0]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["none", "mlp", "layer"])
def test_a_watched_explain_has_the_peak_of_an_unwatched_one(plan: str) -> None:
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    ids = torch.arange(512)[None] % 32

    def explain(model: Any) -> AppliedReport:
        return gim.explain(model, ids, target_token_id=5, baseline_token_id=1, memory=plan)  # type: ignore[return-value]

    explain(hf.LlamaForCausalLM(config).eval())  # what is made once
    model = hf.LlamaForCausalLM(config).eval()
    watched, _ = peak_bytes(lambda: explain(model))
    unwatched, _ = peak_bytes(lambda: explain(model))
    assert watched == unwatched


def test_a_finding_says_where() -> None:
    model = Net(norm=NORMS["rsqrt"])
    with Watch(dict(model.named_modules())) as watch:
        model(IDS)
    (found,) = watch.found
    line = _rms.__code__.co_firstlineno + 1
    assert found == Finding("norm", "Net", f"test_watch.py:{line}", "statistic, mul")
