"""Models outside transformers: every rule at torch's own functions, against the equations written out."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gim
from gim.applied import UnsupportedModelError
from gim_kernels.budget import relative_error
from tests import eager
from tests.eager import EagerRules, attend, scale
from tests.first import first
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

WIDTH, HEADS, KV_HEADS, INNER, LENGTH, BATCH = 32, 4, 2, 40, 13, 2
SIZE = WIDTH // HEADS


class Block(nn.Module):
    """A decoder block that holds parameters and calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Parameter(torch.ones(2, WIDTH))
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * SIZE)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.w1, self.w3 = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.w2 = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = F.rms_norm(x, (WIDTH,), self.norms[0], 1e-5)
        q = self.q(n).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        k, v = self.kv(n).unflatten(-1, (2 * KV_HEADS, SIZE)).transpose(1, 2).chunk(2, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        n = F.layer_norm(x, (WIDTH,), self.norms[1])
        return x + self.w2(F.silu(self.w1(n)) * self.w3(n))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def layer_norm(x: torch.Tensor, weight: Any, bias: Any, rules: EagerRules) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / (std.detach() if rules.freeze_norm else std) * weight + bias


def gate(g: torch.Tensor, u: torch.Tensor, rules: EagerRules) -> torch.Tensor:
    g, u = scale(g, rules.gate_up[0]), scale(u, rules.gate_up[1])
    sigmoid = torch.sigmoid(g)
    return g * (sigmoid.detach() if rules.ratio else sigmoid) * u


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]


def decoder_by_hand(model: Any, x: torch.Tensor, outer: EagerRules, second: EagerRules | None = None) -> torch.Tensor:
    for block, rules in zip(model.blocks, (outer, second or outer), strict=True):
        n = eager.rms_norm(x, block.norms[0], 1e-5, rules)
        q = block.q(n).view(BATCH, -1, HEADS, SIZE).transpose(1, 2)
        kv = block.kv(n).view(BATCH, -1, 2 * KV_HEADS, SIZE).transpose(1, 2)
        a = attend(q, kv[:, :KV_HEADS], kv[:, KV_HEADS:], CAUSAL, SIZE, rules)
        x = x + block.o(a.transpose(1, 2).reshape(BATCH, -1, WIDTH))
        n = layer_norm(x, block.norms[1], 0.0, rules)
        x = x + block.w2(gate(block.w1(n), block.w3(n), rules))
    return model.head(eager.rms_norm(x, model.norm.weight, 1e-5, outer))


class Encoder(nn.Module):
    """torch's own encoder layers, with masks."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.1, F.gelu, batch_first=batch_first, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, **masks: Any) -> torch.Tensor:
        return self.layers(x, **masks)


def encoder_by_hand(model: Encoder, x: torch.Tensor, rules: EagerRules, hidden: torch.Tensor) -> torch.Tensor:
    for layer in model.layers.layers:
        n = layer_norm(x, layer.norm1.weight, layer.norm1.bias, rules)
        mha = layer.self_attn
        q, k, v = (
            (n @ w.T + b).view(BATCH, LENGTH, HEADS, SIZE).transpose(1, 2)
            for w, b in zip(mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True)
        )
        a = attend(q, k, v, hidden, SIZE, rules).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH)
        x = x + mha.out_proj(a)
        n = layer_norm(x, layer.norm2.weight, layer.norm2.bias, rules)
        x = x + layer.linear2(F.gelu(layer.linear1(n)))
    return layer_norm(x, model.layers.norm.weight, model.layers.norm.bias, rules)


class Weights(nn.Module):
    """Attention whose weights are used."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

    def forward(self, x: torch.Tensor, use: float = 1.0, **masks: Any) -> torch.Tensor:
        out, weights = self.attention(x, x, x, **masks)
        return out.sum() + use * (weights * torch.arange(weights.shape[-1])).pow(2).sum()


def make(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
        else:
            parameter.data.mul_(2.0)
    return model.double().eval()


def inputs() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor | None = None) -> torch.Tensor:
    x = (inputs() if x is None else x).requires_grad_(True)
    (grad,) = torch.autograd.grad(call(x).pow(2).sum(), x)
    return grad


def under(model: nn.Module, rules: Any = None, **masks: Any) -> torch.Tensor:
    with gim.GIM(model, rules=rules):
        return gradient(lambda x: model(x, **masks))


PADDING = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
PADDING[0, :4] = True
TRIANGLE = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
MASKS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "none": ({}, torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
    "causal-tensor": ({"mask": TRIANGLE}, CAUSAL),
    "causal-hint": ({"mask": TRIANGLE, "is_causal": True}, CAUSAL),
    "causal-bool": ({"mask": CAUSAL[0, 0]}, CAUSAL),
    "padding": ({"src_key_padding_mask": PADDING}, PADDING[:, None, None]),
    "both": ({"mask": CAUSAL[0, 0], "src_key_padding_mask": PADDING.flip(1)}, CAUSAL | PADDING.flip(1)[:, None, None]),
}


@pytest.mark.parametrize("preset", eager.PRESETS)
def test_functions_follow_every_preset(preset: str) -> None:
    model, rules = make(Decoder), eager.PRESETS[preset]
    want = gradient(lambda x: decoder_by_hand(model, x, rules))
    assert_close64(under(model, preset), want, preset, relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize(
    ("preset", "masked"),
    first(itertools.product(eager.PRESETS, MASKS), lambda preset, masked: preset == "GIM" or masked == "both"),
)
def test_multihead_attention_follows_every_preset_and_mask(preset: str, masked: str) -> None:
    model, rules = make(Encoder), eager.PRESETS[preset]
    masks, hidden = MASKS[masked]
    want = gradient(lambda x: encoder_by_hand(model, x, rules, hidden))
    assert_close64(under(model, preset, **masks), want, preset, relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("preset", ["GIM", "GIM_CONSTANT"])
def test_a_constant_softmax_sends_nothing_into_queries(preset: str) -> None:
    model = make(Decoder)
    with gim.GIM(model, rules=preset):
        loss = model(inputs()).pow(2).sum()
        query, both = torch.autograd.grad(
            loss, [model.blocks[0].q.weight, model.blocks[0].kv.weight], allow_unused=True
        )
    assert (query is None) == (preset == "GIM_CONSTANT") and both.any()


def test_rules_of_ones_own_equal_the_equations() -> None:
    """Five different factors and another temperature: no two can be swapped unseen."""
    model = make(Decoder)
    rules = EagerRules(temperature=3.0, qkv=(0.1, 0.7, 0.3), gate_up=(0.4, 0.9))
    with gim.GIM(model, softmax_temperature=3.0, q_scale=0.1, k_scale=0.7, v_scale=0.3, gate_scale=0.4, up_scale=0.9):
        got = gradient(model)
    want = gradient(lambda x: decoder_by_hand(model, x, rules))
    assert_close64(got, want, "gradient", relative=FLOAT64_MODEL_RELATIVE)


class Gated(nn.Module):
    """A gated MLP, or one that adds its branches, whose activation is given."""

    def __init__(self, act: Callable[[torch.Tensor], Any], join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.act, self.join = act, join
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, u = self.gate(x), self.up(x)
        y = self.act(g)
        return self.down(self.join(g if y is None else y, u))


def discarded(write: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """An activation in place, whose result is not used."""

    def act(x: torch.Tensor) -> None:
        write(x)

    return act


IN_PLACE: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    **{
        run.__name__: (discarded(functools.partial(run, inplace=True)), run)
        for run in (F.silu, F.relu, F.relu6, F.elu, F.celu, F.selu, F.leaky_relu, F.mish, F.hardswish, F.hardsigmoid)
    },
    "hardtanh": (discarded(functools.partial(F.hardtanh, inplace=True)), F.hardtanh),
    "silu by place": (discarded(lambda x: F.silu(x, True)), F.silu),
    "silu, module": (discarded(nn.SiLU(inplace=True)), F.silu),
    "silu, used": (lambda x: F.silu(x, inplace=True), F.silu),
    "leaky_relu by place": (discarded(lambda x: F.leaky_relu(x, 0.3, True)), lambda x: F.leaky_relu(x, 0.3)),
    "hardtanh by place": (discarded(lambda x: F.hardtanh(x, -0.5, 0.5, True)), lambda x: F.hardtanh(x, -0.5, 0.5)),
    "relu_": (discarded(torch.relu_), torch.relu),
    "relu_, method": (discarded(lambda x: x.relu_()), torch.relu),
    "sigmoid_": (discarded(lambda x: x.sigmoid_()), torch.sigmoid),
    "tanh_": (discarded(lambda x: x.tanh_()), torch.tanh),
    "elu_": (discarded(lambda x: F.elu_(x, 0.7)), lambda x: F.elu(x, 0.7)),
    "silu of a part": (
        discarded(lambda x: F.silu(x[..., ::2], inplace=True)),
        lambda x: torch.stack([F.silu(x[..., ::2]), x[..., 1::2]], -1).flatten(-2),
    ),
}


@pytest.mark.parametrize(
    ("name", "join", "preset"),
    first(
        itertools.product(IN_PLACE, (torch.mul, torch.add), ("GIM", "ATTNLRP")),
        lambda name, join, preset: name in ("silu", "silu of a part") or (join is torch.mul and preset == "GIM"),
    ),
)
def test_an_activation_in_place_is_the_same_as_any(name: str, join: Any, preset: str) -> None:
    """Whether its result is used or not: the model's own tensor is written, and the rule acts."""
    found, part = [], name == "silu of a part"  # in which no branch can be told from another
    for act in IN_PLACE[name]:
        model = make(lambda act=act: Gated(act, join))
        with gim.GIM(model, rules=preset, strict=not part) as report:
            found.append((gradient(model), report.counts()))
            y = model(inputs().requires_grad_())
            with torch.no_grad():
                assert torch.equal(model(inputs()), y) or part
        assert relative_error(y, model(inputs())) < 1e-14
    if not part or join is torch.add:
        assert relative_error(found[0][0], found[1][0]) < 1e-14 and found[0][1] == found[1][1]


@pytest.mark.parametrize("preset", ["GIM", "ATTNLRP"])
def test_what_is_written_over_is_no_activation_any_more(preset: str) -> None:
    """The forward is the model's own, and a backward that torch refuses is refused."""

    def more(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return F.silu(g).add_(1.0) * u

    def lost(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        a = F.silu(g)
        g.zero_()
        return a * u

    def unrecorded(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            F.silu(g, inplace=True)
        return g * u

    for join in (more, lost, unrecorded):
        model = make(lambda join=join: Gated(lambda x: x, join))
        with gim.GIM(model, rules=preset, strict=False):
            y = model(inputs().requires_grad_())
        assert relative_error(y, model(inputs())) < 1e-14
        if join is lost:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("build", [Decoder, Encoder], ids=["functions", "modules"])
def test_the_forward_ignores_the_rules_and_is_the_models_own(build: Any) -> None:
    model = make(build)
    own = model(inputs())
    found = []
    for preset in gim.rules.PRESETS:
        with gim.GIM(model, rules=preset):
            found.append(model(inputs()))
            with torch.no_grad():
                found.append(model(inputs()))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert_close64(found[0], own, "output")
    assert torch.equal(model(inputs()), own)
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_report_names_and_counts_every_call() -> None:
    model = make(Decoder)
    with gim.GIM(model) as report:
        gradient(model)
        gradient(model)
    assert report.counts() == {"attention": (2, 4), "norm": (5, 10), "gated_mlp": (2, 4)}
    assert {(a.module, a.recognised) for a in report.applications if a.module == "blocks.1"} == {
        ("blocks.1", "call of F.rms_norm"),
        ("blocks.1", "call of F.layer_norm"),
        ("blocks.1", "call of F.scaled_dot_product_attention"),
        ("blocks.1", "silu(gate) * up"),
    }
    assert report.complete and report.notes == [] and report.engines["attention"] == "blockwise"
    model = make(Encoder)
    with gim.GIM(model) as report:
        gradient(model)
    assert report.notes == ["gate_scale and up_scale: the model has no gated MLP"] and report.watched
    model = make(Weights)
    with gim.GIM(model) as report:
        gradient(model)
    assert any("attention: need_weights=True makes T x S weights" in note for note in report.notes)


class Written(nn.Module):
    """Attention by its equation, which no function shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.mT, -1) @ x


class Partly(nn.Module):
    """One layer calls attention, one writes it out."""

    def __init__(self, second: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), second()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, x, x, need_weights=False)[0])


class Gates(nn.Module):
    """A gated MLP with an activation of its own, in a layout that is in no table."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc_in, self.fc_gate, self.fc_out = (
            nn.Linear(WIDTH, INNER),
            nn.Linear(WIDTH, INNER),
            nn.Linear(INNER, WIDTH),
        )
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc_out(self.fc_in(x) * self.act(self.fc_gate(x)))


def written_by_hand(x: torch.Tensor, rules: EagerRules) -> torch.Tensor:
    return attend(x[:, None], x[:, None], x[:, None], torch.zeros(1, 1, 1, 1, dtype=torch.bool), 1, rules)[:, 0]


def strange_by_hand(x: torch.Tensor, rules: EagerRules) -> torch.Tensor:
    size = x.abs().mean(-1, keepdim=True)
    return x / (size.detach() if rules.freeze_norm else size)


def glu_by_hand(x: torch.Tensor, rules: EagerRules) -> torch.Tensor:
    up, gate = x.chunk(2, -1)
    return scale(up, rules.gate_up[1]) * torch.sigmoid(scale(gate, rules.gate_up[0]))


class Strange(nn.Module):
    """A norm over the mean size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().mean(-1, keepdim=True)


class Glu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.glu(x)


@pytest.mark.parametrize("preset", ["GIM", "GIM_CONSTANT", "GRADIENT", "TRANSFORMER_LRP"])
@pytest.mark.parametrize(
    ("build", "part", "by_hand"),
    [
        (Written, "attention", written_by_hand),
        (Strange, "norm", strange_by_hand),
        (Glu, "gated_mlp", glu_by_hand),
    ],
    ids=["attention", "norm", "glu"],
)
def test_what_is_written_out_follows_its_rule(build: Any, part: Any, by_hand: Any, preset: str) -> None:
    """It calls no function that is the part."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), build()).double()
    with gim.GIM(model, rules=preset) as report:
        got = gradient(model)
    assert report.complete and report.watched and report.counts()[part] == (1, 1)
    want = gradient(lambda x: by_hand(model[0](x), eager.PRESETS[preset]))
    assert_close64(got, want, preset, relative=FLOAT64_MODEL_RELATIVE)


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x


def _halved(x: torch.Tensor) -> torch.Tensor:
    return scale(x, 0.5)


def _rms(x: torch.Tensor, rest: Any) -> torch.Tensor:
    return rest(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _addcmul(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    g, u = x.chunk(2, -1)
    return torch.addcmul(g, F.silu(h(g)), h(u), value=3)


def _lerp(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    g, u = x.chunk(2, -1)
    gate = torch.sigmoid(h(g))
    return torch.lerp(g, u, gate) if h is _plain else g + gate * h(u - g)


def _addcmul_in_place(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    g, u = x.chunk(2, -1)
    return (2 * g).addcmul_(F.silu(h(g)), h(u), value=3)


def _addcdiv_in_place(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    g, u = x.chunk(2, -1)
    return (2 * g).addcdiv_(h(u), 1 + torch.exp(-h(g)))


def _lerp_in_place(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    g, u = x.chunk(2, -1)
    return g.clone().lerp_(u, torch.sigmoid(g)) if h is _plain else _lerp(x, h, _)


def _keywords(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    g, u = x.chunk(2, -1)
    return torch.mul(input=F.silu(input=h(g)), other=h(u))


def _weight_first(x: torch.Tensor, _: Any, rest: Any) -> torch.Tensor:
    return x * (torch.linspace(0.5, 2, WIDTH, dtype=x.dtype) * _rms(x, rest))


def _squares(x: torch.Tensor, _: Any, rest: Any) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * rest(torch.rsqrt((x * x).mean(-1, keepdim=True) - mean * mean))


def _length(x: torch.Tensor, _: Any, rest: Any) -> torch.Tensor:
    return x / rest(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def _in_pieces(x: torch.Tensor, _: Any, rest: Any) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    size = rest((a.square().sum(-1, keepdim=True) + b.square().sum(-1, keepdim=True)).sqrt())
    return torch.cat([a / size, b / size], -1)


def _leaf(x: torch.Tensor, h: Any, _: Any) -> torch.Tensor:
    """A branch is what the gradient is asked for itself."""
    return torch.sigmoid(h(x @ torch.ones(WIDTH, WIDTH, dtype=x.dtype))) * h(x)


@pytest.mark.parametrize(
    ("part", "way"),
    [
        ("gated_mlp", _addcmul),
        ("gated_mlp", _lerp),
        ("gated_mlp", _addcmul_in_place),
        ("gated_mlp", _addcdiv_in_place),
        ("gated_mlp", _lerp_in_place),
        ("gated_mlp", _keywords),
        ("gated_mlp", _leaf),
        ("norm", _weight_first),
        ("norm", _squares),
        ("norm", _length),
        ("norm", _in_pieces),
    ],
)
def test_other_ways_to_write_a_part_follow_its_rule(part: Any, way: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return way(x, _plain, _plain)

    model = Model()
    with gim.GIM(model) as report:
        got, value = gradient(model), model(inputs())
    assert report.complete and report.counts()[part][0] == 1
    want = gradient(lambda x: way(x, _halved, torch.Tensor.detach))
    assert_close64(got, want, way.__name__, relative=FLOAT64_MODEL_RELATIVE)
    assert_close64(value, model(inputs()), "value", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("by", ["sum", "decay"])
def test_weights_keep_their_factor_for_the_values(by: str) -> None:
    """Their own sum, and a factor of each, are no values."""

    def attended(x: torch.Tensor, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights = weights * (torch.ones(LENGTH, LENGTH).tril() if by == "sum" else torch.sigmoid(x @ x.mT * 0.1))
        return (weights / weights.sum(-1, keepdim=True) if by == "sum" else weights) @ values

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attended(x, torch.softmax(input=x @ x.mT, dim=-1), x)

    model = Model()
    with gim.GIM(model, rules=gim.rules.GIM) as report:
        got = gradient(model)
    assert report.complete and report.counts()["attention"] == (1, 1)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        weights = eager.TemperatureSoftmax.apply(scale(x @ x.mT, 0.25), 2.0)
        return attended(x, weights, scale(x, 0.5))

    assert_close64(got, gradient(by_hand), by, relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("build", [lambda: Gates(nn.Hardtanh()), nn.Identity, lambda: Gates(nn.SiLU())])
def test_one_layer_among_others_is_complete(build: Any) -> None:
    model = Partly(build).double().eval()
    with gim.GIM(model) as report:
        gradient(model)
    assert report.complete and report.watched


def test_norms_that_cannot_be_frozen_are_refused() -> None:
    class Group(Partly):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.group_norm(super().forward(x).mT, 4).mT

    model = Group(nn.Identity).double()
    message = "Group: calls group_norm, whose statistic cannot be frozen"
    with gim.GIM(model), pytest.raises(UnsupportedModelError, match=message):
        model(inputs())
    with gim.GIM(model, freeze_norm=False):
        model(inputs())


def test_products_that_are_no_gate_are_left_alone() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((WIDTH,), 0.3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            gate = a * 1.5
            act = F.gelu(gate)
            return act * self.factor + act * torch.ones_like(act) + act * 2.0 + gate * F.silu(gate)

    model = Products().double()
    with gim.GIM(model, rules="SCALES_ONLY") as report:
        got = gradient(model)
    assert report.counts()["gated_mlp"] == (0, 0)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (scale(x, factor) for factor in (0.25, 0.25, 0.5))
        gate = 1.5 * (torch.softmax(q @ k.mT / math.sqrt(WIDTH), -1) @ v)
        act = F.gelu(gate)
        return act * model.factor + 3 * act + gate * F.silu(gate)

    assert_close64(got, gradient(by_hand), "gradient", relative=FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("activation", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")])
@pytest.mark.parametrize("swapped", [False, True])
def test_gated_products_of_every_activation(activation: Any, swapped: bool) -> None:
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = F.layer_norm(x, (WIDTH,)).chunk(2, -1)
            return torch.mul(up, activation(gate)) if swapped else activation(gate) * up

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        gate, up = layer_norm(x, 1.0, 0.0, EagerRules(freeze_norm=False)).chunk(2, -1)
        return activation(scale(gate, 0.3)) * scale(up, 0.8)

    model = Gated()
    with gim.GIM(
        model, freeze_norm=False, softmax_temperature=None, q_scale=None, k_scale=None, v_scale=None,
        gate_scale=0.3, up_scale=0.8,
    ):  # fmt: skip
        got = gradient(model)
    assert_close64(got, gradient(by_hand), "gradient", relative=FLOAT64_MODEL_RELATIVE)


def test_what_is_outside_the_model_is_untouched() -> None:
    model, other, x = make(Decoder), make(Decoder), inputs()

    def outside(y: torch.Tensor) -> torch.Tensor:
        """A loss with attention, a norm, a gate and a softmax of its own, and a second model."""
        normed = F.layer_norm(y, (WIDTH,))
        seen = F.scaled_dot_product_attention(normed[:, None], y[:, None], y[:, None])[:, 0]
        return other(seen + F.silu(y) * normed).softmax(-1).log().sum()

    plain = gradient(outside, x)
    with gim.GIM(model) as report:
        assert torch.equal(gradient(outside, x), plain)
        assert report.counts()["attention"] == (0, 0)
        assert relative_error(gradient(model), gradient(other)) > 1e-3
    assert torch.equal(gradient(outside, x), plain)


def test_a_router_and_a_metric_inside_the_model_keep_their_softmax() -> None:
    class Routed(Partly):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.softmax(x, -1)

    model = Routed(nn.Identity).double()

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        with gim.GIM(model.first):
            attended = model.first(x, x, x, need_weights=False)[0]
        return attended * torch.softmax(x, -1)

    assert_close64(under(model), gradient(by_hand), "gradient", relative=FLOAT64_MODEL_RELATIVE)


def test_nested_contexts_follow_the_inner_rules_and_come_back() -> None:
    model = make(Decoder)
    gim_gradient, plain = under(model, "GIM"), gradient(model)
    with gim.GIM(model) as outer:
        assert_close64(under(model, "GRADIENT"), plain, "inner", relative=FLOAT64_MODEL_RELATIVE)
        assert outer.forwards == 0
        assert torch.equal(gradient(model), gim_gradient)
        with gim.GIM(model.blocks[1], rules="GRADIENT") as part:
            mixed = gradient(model)
    assert part.counts()["attention"] == (1, 1)

    rules = eager.PRESETS["GIM"]
    want = gradient(lambda x: decoder_by_hand(model, x, rules, second=eager.PRESETS["GRADIENT"]))
    assert_close64(mixed, want, "mixed", relative=FLOAT64_MODEL_RELATIVE)


def test_a_module_follows_its_own_context_wherever_it_is_called_from() -> None:
    class Caller(nn.Module):
        """Calls a module that is not its own."""

        def __init__(self, called: nn.Module) -> None:
            super().__init__()
            self.called = [called]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            return self.called[0](x)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            self.caller = Caller(self.block)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.caller(x)

    model = make(Both)
    with gim.GIM(model, rules="GIM"), gim.GIM(model.caller, rules="GRADIENT") as inner:
        got = gradient(model)
    assert inner.counts() == {"attention": (1, 1), "norm": (0, 0), "gated_mlp": (0, 0)}
    x = inputs()
    with gim.GIM(model.block):
        want = gradient(
            lambda y: model.block(F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]), x
        )
    assert_close64(got, want, "gradient", relative=FLOAT64_MODEL_RELATIVE)


def test_two_threads_with_two_rule_sets_do_not_see_each_other() -> None:
    jobs = [(make(Decoder), "GIM"), (make(Decoder), "GRADIENT")]
    want = [under(model, rules) for model, rules in jobs]
    assert relative_error(want[0], want[1]) > 1e-3
    failures: list[str] = []
    barrier = threading.Barrier(2)
    count = torch.get_num_threads()

    def work(index: int) -> None:
        torch.set_num_threads(count)  # a new thread takes every core at first, and rounds its sums otherwise
        model, rules = jobs[index]
        barrier.wait()
        for _ in range(8):
            if not torch.equal(under(model, rules), want[index]):
                failures.append(rules)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Checkpointed(Decoder):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def test_a_checkpoint_inside_the_context_gives_the_same_gradient_and_counts_once() -> None:
    model = make(Checkpointed)
    with gim.GIM(model) as report:
        got = gradient(model)
    assert torch.equal(got, under(make(Decoder)))
    assert report.counts() == {"attention": (2, 2), "norm": (5, 5), "gated_mlp": (2, 2)}


def test_a_checkpoint_that_runs_again_after_the_context_raises() -> None:
    model, x = make(Checkpointed), inputs().requires_grad_(True)
    with gim.GIM(model):
        loss = model(x).sum()
    with pytest.raises(Exception, match=r"tensors was saved during|different metadata|context has closed"):
        loss.backward()
    assert x.grad is None
    model.reentrant = True
    with gim.GIM(model), pytest.raises(UnsupportedModelError, match=r"blocks\.0: runs in a reentrant checkpoint"):
        model(x)


def test_a_checkpoint_around_a_function_changes_nothing() -> None:
    class Inner(Partly):
        checkpointed = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x, x, x, need_weights=False)[0]

            def attend(y: torch.Tensor) -> torch.Tensor:
                y = F.gelu(y) * 2.0
                return F.scaled_dot_product_attention(y, y, y)

            return checkpoint(attend, x, use_reentrant=False) if self.checkpointed else attend(x)

    model = Inner(nn.Identity).double().eval()
    with gim.GIM(model) as report:
        got = gradient(model)
    assert report.complete and report.counts()["attention"] == (2, 2)
    model.checkpointed = False
    assert torch.equal(got, under(model))


def test_an_exception_leaves_nothing_behind() -> None:
    def users_error(*_: Any) -> None:
        raise KeyError("a user's own error")

    model = make(Decoder)
    plain = gradient(model)
    with pytest.raises(RuntimeError), gim.GIM(model):
        model(torch.randn(1, 2, WIDTH + 1).double())
    assert torch.equal(gradient(model), plain)
    with pytest.raises(KeyError), gim.GIM(model):
        model.head.register_forward_hook(users_error)
        model(inputs())
    model.head._forward_hooks.clear()
    assert torch.equal(gradient(model), plain)
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda one: torch.jit.trace(one, inputs().float())])
def test_scripted_modules_are_refused(compiled: Any) -> None:
    """No function of Python runs in them, but the watch sees their operators."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), compiled(nn.LayerNorm(WIDTH))).double()
    with pytest.raises(UnsupportedModelError, match=r"1: norm \(native_layer_norm"), gim.GIM(model):
        model(inputs())
    root = compiled(nn.LayerNorm(WIDTH)).double()
    before = set(root.__dict__)
    with pytest.raises(UnsupportedModelError, match=r"Module: norm \(native_layer_norm"), gim.GIM(root):
        root(inputs())
    assert set(root.__dict__) == before


def test_a_hugging_face_model_inside_a_plain_one() -> None:
    from tests.families import ids
    from tests.families import make as family

    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = family("qwen3").model
            self.norm = nn.LayerNorm(48)

        def forward(self, embedded: torch.Tensor) -> torch.Tensor:
            return self.norm(self.backbone(inputs_embeds=embedded, use_cache=False).last_hidden_state)

    model = Reward().double().eval()
    embedded = model.backbone.embed_tokens(ids()).detach()
    with gim.GIM(model) as report:
        got = gradient(model, embedded)
    assert report.counts() == {"attention": (3, 3), "norm": (14, 14), "gated_mlp": (3, 3)}
    assert {a.module for a in report.of("attention")} == {f"backbone.layers.{i}.self_attn" for i in range(3)}
    with gim.GIM(model.backbone), gim.GIM(model.norm, **OFF):
        want = gradient(model, embedded)
    assert_close64(got, want, "gradient", relative=FLOAT64_MODEL_RELATIVE)
    assert model.backbone.config._attn_implementation == "sdpa"


#: Every rule but the norm's.
OFF: dict[str, Any] = {
    "softmax_temperature": None, "q_scale": None, "k_scale": None, "v_scale": None,
    "gate_scale": None, "up_scale": None,
}  # fmt: skip


@pytest.mark.parametrize("way", ["linear", "tensordot", "squared"])
def test_weights_that_meet_their_values_in_an_unknown_way_are_refused(way: str) -> None:
    """The softmax is applied; the factor of the values would be left out."""

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = torch.softmax(x @ x.mT, -1)
            if way == "linear":
                return torch.stack([F.linear(w, v.T) for w, v in zip(weights, x, strict=True)])
            if way == "tensordot":
                return torch.stack([torch.tensordot(w, v, dims=1) for w, v in zip(weights, x, strict=True)])
            return weights @ weights @ x

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Odd()).double()
    with pytest.raises(UnsupportedModelError, match=r"1: brings its attention weights to"), gim.GIM(model):
        model(inputs())
    with gim.GIM(model, v_scale=None) as report:
        model(inputs())
    assert report.complete and report.counts()["attention"] == (1, 1)


@pytest.mark.parametrize("longer", ["gate", "up"])
def test_branches_of_any_length_meet_in_what_is_explained(longer: str) -> None:
    """One branch may be at the end of its graph long before the other."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            g, u = self.gate(x), self.up(x)
            for _ in range(5):
                g, u = (0.5 * g + 0.1, u) if longer == "gate" else (g, 0.5 * u + 0.1)
            return F.silu(g) * u

    model = make(Uneven)
    with gim.GIM(model, gate_scale=0.3, up_scale=0.7) as report:
        got = gradient(model)
    assert report.counts()["gated_mlp"] == (1, 1)

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        g, u = scale(model.gate(x), 0.3), scale(model.up(x), 0.7)
        for _ in range(5):
            g, u = (0.5 * g + 0.1, u) if longer == "gate" else (g, 0.5 * u + 0.1)
        return F.silu(g) * u

    assert_close64(got, gradient(by_hand), longer, relative=FLOAT64_MODEL_RELATIVE)


class Rotary(nn.Module):
    """Attention written out, its queries and keys turned by complex numbers or by cosines and sines."""

    def __init__(self, by_complex: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.by_complex = nn.Linear(WIDTH, 3 * WIDTH), by_complex

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(LENGTH).double(), torch.linspace(0.1, 1.0, WIDTH // 2).double())
        if self.by_complex:
            turn = torch.polar(torch.ones_like(angle), angle)
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, -1).flatten(-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(self.turned(q) @ self.turned(k).mT / WIDTH**0.5, -1) @ v


def test_queries_turned_by_complex_numbers_are_linear_in_what_they_were() -> None:
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    grads = []
    for by_complex in (True, False):
        given = x.clone().requires_grad_()
        with gim.GIM(model := Rotary(by_complex).double().eval(), rules="GIM") as report:
            (grad,) = torch.autograd.grad(model(given).pow(2).sum(), given)
        grads.append(grad)
        assert report.complete and report.counts()["attention"] == (1, 1)
        assert not any("no rule is about it" in note for note in report.notes)
    assert_close64(grads[0], grads[1], "complex rotary", FLOAT64_MODEL_RELATIVE)
