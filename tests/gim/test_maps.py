"""Linear maps of one value computed twice are one value; what linear maps and pools make of squares is a statistic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gim
from gim.applied import AppliedReport, UnsupportedModelError
from gim.intercept import flow
from gim_kernels.reference import scale_gradient
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

WIDTH, GROUP, EPS = 16, 4, 1e-6
IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


class Block(nn.Module):
    """An embedding, one function of it beside it, a head; ``written`` is the same with the rules written out."""

    def __init__(self, compute: Callable[[Block, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, 10)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) / GROUP)
        self.stack = nn.Parameter(torch.randn(WIDTH, WIDTH, WIDTH) / GROUP)
        self.mean = nn.Parameter(torch.full((WIDTH, 1), 1 / WIDTH))
        self.compute, self.written = compute, False

    def constant(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() if self.written else x

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return scale_gradient(gate, 0.5) * scale_gradient(up, 0.5) if self.written else gate * up

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        out: torch.Tensor = self.head(x + self.compute(self, x))
        return out


def _scale(square: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(square + EPS)


#: One map of one input, called twice: an activation, and no gate.
TWICE: dict[str, Callable[[Block, torch.Tensor], torch.Tensor]] = {
    "module": lambda m, x: m.one(x) * torch.sigmoid(m.one(x)),
    "matmul": lambda m, x: (x @ m.square) * torch.sigmoid(x @ m.square),
    "from the left": lambda m, x: ((m.square @ x.mT) * torch.sigmoid(m.square @ x.mT)).mT,
    "addmm": lambda m, x: (
        torch.stack([torch.addmm(m.one.bias, y, m.square) for y in x])
        * torch.sigmoid(torch.stack([torch.addmm(m.one.bias, y, m.square) for y in x]))
    ),
    "rows of one": lambda m, x: (torch.mm(x[0], m.square) * torch.sigmoid(torch.mm(x[0], m.square)))[None],
    "convolution": lambda m, x: (m.conv(x.mT) * torch.sigmoid(m.conv(x.mT))).mT,
    "einsum": lambda m, x: (
        torch.einsum("btd,dk->btk", x, m.square) * torch.sigmoid(torch.einsum("btd,dk->btk", x, m.square))
    ),
    "by name": lambda m, x: F.linear(x, weight=m.square) * torch.sigmoid(F.linear(input=x, weight=m.square)),
    "addmm by name": lambda m, x: (
        torch.addmm(m.one.bias, mat1=x[0], mat2=m.square)
        * torch.sigmoid(torch.addmm(input=m.one.bias, mat2=m.square, mat1=x[0]))
    )[None],
    "vector": lambda m, x: (
        torch.stack([torch.mv(m.square, y) for y in x[0]])
        * torch.sigmoid(torch.stack([torch.mv(m.square, vec=y) for y in x[0]]))
    )[None],
    "linear, and a product with the transposed": lambda m, x: m.one(x) * torch.sigmoid(x @ m.one.weight.T + m.one.bias),
    "a product, and linear with the transposed": lambda m, x: (x @ m.square) * torch.sigmoid(F.linear(x, m.square.mT)),
    "linear, and einsum": lambda m, x: F.linear(x, m.square) * torch.sigmoid(torch.einsum("btd,kd->btk", x, m.square)),
    "a product, and einsum": lambda m, x: (x @ m.square) * torch.sigmoid(torch.einsum("b t d, dk -> btk", x, m.square)),
    "a vector by three names": lambda m, x: (
        torch.stack([torch.mv(m.square, y) for y in x[0]])
        * torch.sigmoid(torch.stack([F.linear(y, m.square) for y in x[0]]))
        * torch.tanh(torch.stack([m.square @ y for y in x[0]]))
    )[None],
    "addmm, and linear": lambda m, x: (torch.addmm(m.one.bias, x[0], m.one.weight.t()) * torch.sigmoid(m.one(x[0])))[
        None
    ],
    "twice a product": lambda m, x: (
        torch.addmm(m.one.bias, x[0], m.square) * torch.sigmoid(torch.addmm(m.one.bias, x[0], m.square, alpha=2))
    )[None],
    "the other way round": lambda m, x: (m.square @ x.mT).mT * torch.sigmoid(F.linear(x, m.square)),
    "two maps": lambda m, x: m.two(m.one(x)) * torch.sigmoid(m.two(m.one(x))),
    "view of a weight": lambda m, x: (
        F.linear(x, m.square[:8]).repeat(1, 1, 2) * torch.sigmoid(F.linear(x, m.square[:8]).repeat(1, 1, 2))
    ),
}
#: Maps that differ: a gate.
TWO: dict[str, Callable[[Block, torch.Tensor], torch.Tensor]] = {
    "modules": lambda m, x: m.gated(torch.sigmoid(m.one(x)), m.two(x)),
    "from the left": lambda m, x: m.gated(torch.sigmoid(m.square @ x.mT), m.one.weight @ x.mT).mT,
    "of one tensor": lambda m, x: m.gated(torch.sigmoid(x @ m.square), F.linear(x, m.square)),
    "of one tensor by einsum": lambda m, x: m.gated(
        torch.sigmoid(torch.einsum("btd,kd->btk", x, m.square)), torch.einsum("btd,dk->btk", x, m.square)
    ),
    "of a stack, and its diagonal": lambda m, x: m.gated(
        torch.sigmoid((x @ m.stack)[0]), torch.einsum("btd,ddk->btk", x.expand(WIDTH, -1, -1), m.stack)[0]
    )[None],
    "rows of a weight": lambda m, x: m.gated(
        torch.sigmoid(F.linear(x, m.square[:8])), F.linear(x, m.square[8:])
    ).repeat(1, 1, 2),
    "convolutions": lambda m, x: (
        m.gated(torch.sigmoid(m.conv(x.mT)), F.conv1d(x.mT, m.conv.weight, m.conv.bias, padding=2, dilation=2)).mT
    ),
    "made for the call": lambda m, x: m.gated(torch.sigmoid(F.linear(x, m.square * 2)), F.linear(x, m.square * 3)),
    "parameters made for the call": lambda m, x: m.gated(
        torch.sigmoid(F.linear(x, nn.Parameter(m.square * 2))), F.linear(x, nn.Parameter(m.square * 3))
    ),
    "behind an einsum of one": lambda m, x: m.gated(
        torch.sigmoid(m.one(torch.einsum("btd->bdt", x).mT)), torch.einsum("btd->btd", m.two(x))
    ),
    "of two inputs": lambda m, x: m.gated(torch.sigmoid(m.one(F.silu(x))), m.one(x)),
    "twice, and another": lambda m, x: m.gated(m.one(x) * torch.sigmoid(m.one(x)), m.two(x)),
}
#: A value times or over a statistic of its squares.
NORMS: dict[str, Callable[[Block, torch.Tensor], torch.Tensor]] = {
    "matmul": lambda m, x: x * m.constant(_scale((x * x) @ m.mean)),
    "matmul of ones": lambda m, x: x * m.constant(_scale(x.pow(2) @ torch.full_like(m.mean.detach(), 1 / WIDTH))),
    "the other order": lambda m, x: m.constant(_scale((x * x) @ m.mean)) * x,
    "linear": lambda m, x: x * m.constant(_scale(F.linear(x * x, m.mean.T))),
    "a vector": lambda m, x: x * m.constant(_scale(((x * x) @ m.mean[:, 0])[..., None])),
    "quotient": lambda m, x: x / m.constant(torch.sqrt((x * x) @ m.mean + EPS)),
    "convolution": lambda m, x: x * m.constant(_scale(F.conv1d((x * x).mT, m.mean.T[..., None]).mT)),
    "groups": lambda m, x: (
        x.unflatten(-1, (-1, GROUP))
        * m.constant(_scale((x * x) @ torch.kron(torch.eye(GROUP), torch.full((GROUP, 1), 1 / GROUP)).to(x)))[..., None]
    ).flatten(-2),
    "itself by einsum": lambda m, x: x * m.constant(_scale(torch.einsum("btd,btd->bt", x, x)[..., None] / WIDTH)),
    "itself by matmul": lambda m, x: x * m.constant(_scale((x[..., None, :] @ x[..., None])[..., 0] / WIDTH)),
    "average pool": lambda m, x: x * m.constant(_scale(F.avg_pool1d(x * x, WIDTH))),
    "adaptive pool": lambda m, x: x * m.constant(_scale(F.adaptive_avg_pool1d(x * x, 1))),
    "pools of groups": lambda m, x: x * m.constant(_scale(F.avg_pool1d(x * x, GROUP)).repeat_interleave(GROUP, dim=-1)),
    "windows": lambda m, x: x * m.constant(_scale(F.avg_pool1d(x * x, 3, 1, 1))),
    "windows along an axis of their own": lambda m, x: (
        x * m.constant(_scale(F.avg_pool2d((x * x)[:, None], (1, 3), 1, (0, 1))[:, 0]))
    ),
    "largest": lambda m, x: x / m.constant(F.max_pool1d(x.abs(), WIDTH) + EPS),
    "of a map called twice": lambda m, x: m.one(x) * m.constant(_scale(m.one(x).pow(2).mean(-1, keepdim=True))),
}


def gradient(model: Block, **context: str) -> tuple[torch.Tensor, AppliedReport | None]:
    embedded: list[torch.Tensor] = []

    def ask(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    with model.embed.register_forward_hook(ask):
        if context:
            with gim.GIM(model, rules=context["rules"]) as report:
                out = model(IDS)
        else:
            report, out = None, model(IDS)
    (grad,) = torch.autograd.grad(out.pow(2).sum() + out[0, -1, 3], embedded)
    return grad, report


def check(compute: Callable[[Block, torch.Tensor], torch.Tensor], frozen: bool, part: str | None) -> None:
    model = Block(compute).double().eval().requires_grad_(not frozen)
    plain, _ = gradient(model)
    for _ in range(2):  # watched, and not
        got, report = gradient(model, rules="GIM")
        assert report is not None and report.complete and {one.part for one in report.applications} == {part} - {None}
        model.written = True
        want, _ = gradient(model)
        model.written = False
        assert_close64(got, want, "the rules written out", FLOAT64_MODEL_RELATIVE)
        assert torch.allclose(want, plain) == (part is None)  # so that a rule that did not act would show


frozen = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "live"])


@frozen
@pytest.mark.parametrize("name", TWICE)
def test_one_map_called_twice_is_an_activation(name: str, frozen: bool) -> None:
    check(TWICE[name], frozen, None)


@frozen
@pytest.mark.parametrize("name", TWO)
def test_two_maps_are_a_gate(name: str, frozen: bool) -> None:
    check(TWO[name], frozen, "gated_mlp")


#: One factor for all features, or for all tokens, which is no branch of a gated product however it is written.
BROADCAST: dict[str, Callable[[Block, torch.Tensor], torch.Tensor]] = {
    "by torch": lambda m, x: torch.sigmoid(m.one(x)[..., :1]) * m.two(x),
    "expanded": lambda m, x: torch.sigmoid(m.one(x)[..., :1]).expand_as(x) * m.two(x),
    "expanded over tokens": lambda m, x: m.two(x) * torch.sigmoid(m.one(x.mean(1, keepdim=True))).expand_as(x),
}


@frozen
@pytest.mark.parametrize("name", BROADCAST)
def test_a_factor_that_is_broadcast_is_no_gate(name: str, frozen: bool) -> None:
    check(BROADCAST[name], frozen, None)


def test_one_map_of_two_constants_is_two_values() -> None:
    """Of data that asks for no gradient the graph knows nothing but the weight."""
    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    roots = []
    for data in torch.randn(2, 3, WIDTH):
        out = F.linear(data, weight)
        flow.tell_weight(out, (data, weight), "linear")
        roots.append((flow.origin(out).root, out))
    assert roots[0][0] != roots[1][0]


@frozen
@pytest.mark.parametrize("name", NORMS)
def test_a_statistic_by_maps_and_pools_is_a_norms(name: str, frozen: bool) -> None:
    check(NORMS[name], frozen, "norm")


def _variance(m: Block, x: torch.Tensor) -> torch.Tensor:
    return (x - x @ m.mean) * _scale((x * x) @ m.mean - (x @ m.mean) ** 2)


def _through_an_activation(m: Block, x: torch.Tensor) -> torch.Tensor:
    return m.two(F.silu(m.one(x))) * torch.sigmoid(m.two(F.silu(m.one(x))))


def _scores(m: Block, x: torch.Tensor) -> torch.Tensor:
    return m.one(x) @ m.two(x).mT / WIDTH**0.5


#: What is not applied, and what it is named as.
NAMED: dict[str, tuple[str, Callable[[Block, torch.Tensor], torch.Tensor]]] = {
    "a variance": ("norm", _variance),
    "a map called twice behind an activation": ("gated product", _through_an_activation),
    "a sum by scattering": (
        "norm",
        lambda m, x: x * _scale(x.new_zeros(*x.shape[:-1], 1).scatter_add(-1, torch.zeros_like(x).long(), x * x)),
    ),
    "a running sum's last": ("norm", lambda m, x: x * _scale((x * x).cumsum(-1)[..., -1:] / WIDTH)),
    "a distance": ("norm", lambda m, x: x / torch.cdist(x, torch.zeros(1, 1, WIDTH).to(x))),
    "exponentials computed twice": (
        "softmax",
        lambda m, x: (_scores(m, x).exp() / _scores(m, x).exp().sum(-1, keepdim=True)) @ x,
    ),
    "exponentials over their sum and a little": (
        "softmax",
        lambda m, x: (lambda s: s.exp() / (s.exp().sum(-1, keepdim=True) + EPS))(_scores(m, x)) @ x,
    ),
    "normalised exponentials": ("softmax", lambda m, x: F.normalize(_scores(m, x).exp(), p=1.0, dim=-1) @ x),
    "exponentials over their length": (
        "softmax",
        lambda m, x: (lambda s: s.exp() / s.exp().norm(dim=-1, keepdim=True))(_scores(m, x)) @ x,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_not_applied_is_named(name: str) -> None:
    words, compute = NAMED[name]
    with pytest.raises(UnsupportedModelError, match=words):
        gradient(Block(compute).double().eval(), rules="GIM")


@pytest.mark.parametrize("name", TWICE)
def test_a_rule_that_acts_on_an_activation_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what tells the two calls of a map to be one taken away, the factors of a gate are applied to them."""
    monkeypatch.setattr(flow, "_mapped", lambda _: flow._new())
    with pytest.raises(UnsupportedModelError, match="activation taken for a gate"):
        gradient(Block(TWICE[name]).double().eval(), rules="GIM")
    gradient(Block(TWICE[name]).double().eval(), rules="FREEZE_ONLY")  # which has no factors


def test_a_rule_that_acts_on_a_softmax_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "_pointwise", lambda *given: pointwise(*given)._replace(scores=False))
    monkeypatch.setattr(flow, "in_words", lambda node, *_: ("as others", node._sequence_nr()))
    model = Block(lambda m, x: (lambda s: s.exp() / s.exp().sum(-1, keepdim=True))(_scores(m, x)) @ x).double().eval()
    with pytest.raises(UnsupportedModelError, match="softmax taken for a norm"):
        gradient(model, rules="GIM")


pointwise = flow._pointwise


def test_a_norm_of_bent_attention_is_a_norm() -> None:
    """What attention gives is no score, whatever becomes of it before it is normed."""

    def compute(m: Block, x: torch.Tensor) -> torch.Tensor:
        bent = F.gelu(torch.softmax(_scores(m, x), -1) @ x)
        return bent * m.constant(_scale(bent.pow(2).mean(-1, keepdim=True)))

    model = Block(compute).double().eval()
    got, report = gradient(model, rules="FREEZE_ONLY")
    assert report is not None and report.counts()["norm"] == (1, 1)
    model.written = True
    assert_close64(got, gradient(model)[0], "the rule written out", FLOAT64_MODEL_RELATIVE)


def test_a_learned_factor_for_a_row_is_no_norm() -> None:
    check(lambda m, x: x * torch.sigmoid(x @ m.mean), True, None)


def test_a_mix_of_weights_is_noted() -> None:
    """A softmax over the outputs of a map, times weights: attention over learned keys and values, or a router."""
    model = Block(lambda m, x: torch.softmax(x @ m.square, -1) @ m.one.weight).double().eval()
    _, report = gradient(model, rules="GIM")
    assert report is not None and any("weights mixed by a softmax of no scores" in note for note in report.notes)


def test_what_maps_and_statistics_are_of_takes_no_longer_than_the_graph_is_large() -> None:
    """Every step joins what came before twice: walked path by path, this would take until the end of time."""

    def joined(m: Block, x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.cat([F.silu(m.one(x)), x], -1) @ torch.cat([m.square, m.square])
        return m.gated(F.silu(m.one(x)), m.two(x))

    def nested(m: Block, x: torch.Tensor) -> torch.Tensor:
        rate = x @ m.mean
        for _ in range(40):
            rate = rate * torch.sigmoid(rate)
        return x * rate

    def chained(m: Block, x: torch.Tensor) -> torch.Tensor:
        kept = x
        for _ in range(1200):
            x = kept + torch.tanh(m.one(x))
        return m.gated(F.silu(m.one(x)), m.two(x))

    check(joined, True, "gated_mlp")
    check(nested, True, None)
    check(chained, True, "gated_mlp")
