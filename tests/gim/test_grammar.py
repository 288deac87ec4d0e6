"""Gates drawn from a grammar of ways to write them: the rule is applied exactly, or the part is refused by name."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gim
from gim.applied import UnsupportedModelError
from tests.eager import scale
from tests.families import ids
from tests.families import make as family
from tests.first import first
from tests.oracle import assert_close64

WIDTH, INNER = 48, 20
Unary = Callable[[torch.Tensor], torch.Tensor]
Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Unary] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "mish": F.mish,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "x sigmoid": lambda x: x * torch.sigmoid(x),
    "sigmoid x": lambda x: torch.sigmoid(1.702 * x) * x,
    "by exp": lambda x: x / (1 + torch.exp(-x)),
    "by reciprocal": lambda x: x * (1 + (-x).exp()).reciprocal(),
    "by power": lambda x: x * (1 + (-x).exp()) ** -1,
    "by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7979 * (x + 0.0447 * x**3))),
    "by erf": lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x > 0),
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "in place": lambda x: x.sigmoid().clone().mul_(2.0).sub_(0.5),
    "cosine": torch.cos,
    "log": lambda x: torch.log1p(x.exp()),
}
#: Those that are 0 on a whole side.
ZERO = ("relu", "relu squared", "mask", "clamp", "maximum", "hardswish")
AROUND: dict[str, tuple[Unary, Unary]] = {
    "": (lambda x: x, lambda x: x),
    "scaled": (lambda x: 1.5 * x, lambda x: x / 1.5),
    "shifted": (lambda x: x + 0.3, lambda x: x - 0.1),
    "clamped": (lambda x: x.clamp(-7, 7), lambda x: x),
    "viewed": (lambda x: x.unflatten(-1, (4, 5)), lambda x: x.flatten(-2)),
    "turned": (lambda x: x.mT, lambda x: x.mT),
    "in two types": (lambda x: x.float().double(), lambda x: x),
}


def _into(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.clone()
    z *= y
    return z


PRODUCTS: dict[str, Binary] = {
    "*": lambda a, u: a * u,
    "mul": torch.mul,
    "method": lambda a, u: a.mul(u),
    "in place": _into,
    "einsum": lambda a, u: torch.einsum("bti,bti->bti", a, u),
    "addcmul": lambda a, u: torch.addcmul(torch.zeros_like(a), a, u),
    "over": lambda a, u: u / (1 / a),
    "out": lambda a, u: torch.multiply(a, u),
    "prod": lambda a, u: torch.stack([a, u]).prod(0),
    "by columns": lambda a, u: torch.cat([a[..., :7] * u[..., :7], a[..., 7:] * u[..., 7:]], -1),
}
LAYOUTS = ("two", "fused", "interleaved", "deep", "grouped")


class Gate(nn.Module):
    """A gated MLP, as it is drawn."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.layout = draw.choice(LAYOUTS)
        act, product = draw.choice([*ACTIVATIONS]), draw.choice([*PRODUCTS])
        if act in ZERO and product == "over":
            product = "*"  # 1 / 0 has no gradient for anybody
        self.names = (act, draw.choice([*AROUND]), product, draw.random() < 0.3)
        self.both, self.deep = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def branches(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.both(x)
        if self.layout == "interleaved":
            return both[..., ::2], both[..., 1::2]
        if self.layout == "grouped":
            gate, up = both.unflatten(-1, (2, INNER)).unbind(-2)
            return gate, up
        if self.layout == "two":
            return F.linear(x, self.both.weight[:INNER]), F.linear(x, self.both.weight[INNER:])
        gate, up = both.chunk(2, -1)
        return (self.deep(gate), up) if self.layout == "deep" else (gate, up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.branches(x)
        act, around, product, swapped = self.names
        before, after = AROUND[around]
        a = after(ACTIVATIONS[act](before(gate)))
        return self.down(PRODUCTS[product](up, a) if swapped and product != "over" else PRODUCTS[product](a, up))

    def by_hand(self, x: torch.Tensor) -> torch.Tensor:
        """With the factors on the branches, and a plain product."""
        gate, up = self.branches(x)
        act, around, *_ = self.names
        before, after = AROUND[around]
        return self.down(after(ACTIVATIONS[act](before(scale(gate, 0.5)))) * scale(up, 0.5))


class Around(nn.Module):
    """A model of nobody's library around a gate."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate(x)


RULES = gim.rules.Rules("exact", 1.0, False, 1.0, 1.0, 1.0, 0.5, 0.5)


def gradient(call: Unary) -> torch.Tensor:
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(call(x).pow(2).sum(), x)
    return grad


def embedding_gradient(model: Any) -> torch.Tensor:
    embedded = model.get_input_embeddings()(ids(1)).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=embedded, use_cache=False).logits[0, -1].pow(2).sum(), embedded)
    return grad


def _with_factors(mlp: Any) -> Unary:
    return lambda x: mlp.down_proj(F.silu(scale(mlp.gate_proj(x), 0.5)) * scale(mlp.up_proj(x), 0.5))


def become(seed: int, hugging_face: bool) -> str:
    """What becomes of one gate: "applied", "refused", or what is wrong."""
    torch.manual_seed(seed)
    gate = Gate(random.Random(seed)).double()
    drawn = f"{gate.layout}, {gate.names}"
    model: Any = family("llama") if hugging_face else Around(gate)
    if hugging_face:
        model.model.layers[1].mlp = gate
    take = embedding_gradient if hugging_face else gradient
    name = "model.layers.1.mlp" if hugging_face else "gate"
    try:
        with gim.GIM(model, rules=RULES) as report:
            got = take(model)
    except UnsupportedModelError as error:
        return "refused" if name in str(error) else f"refused without its name: {drawn}: {error}"
    if name not in [row.module for row in report.of("gated_mlp")]:
        return f"silent: {drawn}"
    by_hand = copy.deepcopy(model)
    if hugging_face:
        for layer in by_hand.model.layers:
            own = layer.mlp
            own.forward = own.by_hand if isinstance(own, Gate) else _with_factors(own)
    else:
        by_hand.gate.forward = by_hand.gate.by_hand
    with gim.GIM(by_hand, rules="GRADIENT"):  # for its norms, which round to float32 by themselves
        want = take(by_hand)
    wrong = float((got - want).abs().max() / want.abs().max())
    return "applied" if wrong < 1e-9 else f"wrong by {wrong:.1e}: {drawn}"


@pytest.mark.parametrize(
    ("hugging_face", "seeds"),
    first(itertools.product((False, True), (range(60), range(60, 200))), {(False, range(60))}),
    ids=str,
)
def test_gates_of_a_grammar_are_applied_or_refused(hugging_face: bool, seeds: range) -> None:
    became = [become(seed, hugging_face) for seed in seeds]
    wrong = [one for one in became if one not in ("applied", "refused")]
    assert not wrong
    assert became.count("applied") >= 0.8 * len(became)


class _Ratio(torch.autograd.Function):
    """An activation whose derivative is ``act(x) / x``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Unary) -> torch.Tensor:
        out = act(x)
        ctx.save_for_backward(out / x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ratio,) = ctx.saved_tensors
        return grads[0] * ratio, None


def _sum_of_exp(x: torch.Tensor) -> torch.Tensor:
    return 1 + torch.exp(-x)


#: Ways of writing a product of a gate's activation and another branch, and the activation.
BY_RATIO: dict[str, tuple[Binary, Unary]] = {
    "product": (lambda g, u: u * torch.sigmoid(g), torch.sigmoid),
    "over a bent branch": (lambda g, u: u / _sum_of_exp(g), torch.sigmoid),
    "over a reciprocal": (lambda g, u: u / torch.reciprocal(F.silu(g)), F.silu),
    "over in place": (lambda g, u: u.clone().div_(_sum_of_exp(g)), torch.sigmoid),
    "bent over another": (lambda g, u: F.silu(g) / u, F.silu),
    "the gate last": (lambda g, u: torch.sigmoid(g) * u * g, F.silu),
    "quotient, the gate last": (lambda g, u: u / _sum_of_exp(g) * g, F.silu),
    "two functions of the gate": (lambda g, u: torch.sigmoid(g) * u * torch.tanh(g), lambda g: g.sigmoid() * g.tanh()),
}


@pytest.mark.parametrize("way", BY_RATIO)
def test_the_ratio_of_all_of_the_activation_is_applied_or_refused(way: str) -> None:
    torch.manual_seed(0)
    product, act = BY_RATIO[way]

    class Written(Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            return self.down(product(gate, up))

        def by_hand(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.both(x).chunk(2, -1)
            up = scale(up, 0.5)
            return self.down(_Ratio.apply(scale(gate, 0.5), act) * (1 / up if way == "bent over another" else up))

    written = Written(random.Random(0)).double()
    model = Around(written)
    rules = gim.rules.Rules("exact", 1.0, False, 1.0, 1.0, 1.0, 0.5, 0.5, "ratio")
    if "last" in way or "two functions" in way:
        with pytest.raises(UnsupportedModelError, match="gate: .*act"), gim.GIM(model, rules=rules):
            gradient(model)
        return
    with gim.GIM(model, rules=rules):
        got = gradient(model)
    want = gradient(lambda x: x + written.by_hand(x))
    assert_close64(got, want, way)
