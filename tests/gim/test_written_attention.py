"""Attention that a model writes out by itself, whatever its scores and weights are made of, against rules by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gim
from gim.applied import AppliedReport, UnsupportedModelError
from gim.intercept import flow
from tests import eager
from tests.eager import scale
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

WIDTH, HEADS, TOKENS = 16, 2, 7
RULES = ("GIM", "TSG_ONLY", "SCALES_ONLY", "GIM_CONSTANT", "TRANSFORMER_LRP")


class Attention(nn.Module):
    """An attention over the whole sequence; with ``rules`` its backward is theirs, written here."""

    def __init__(self, compute: Callable[[Attention, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = ("query", "key", "value", "query2", "key2", "gate", "out")
        self.maps = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})
        self.small = nn.Linear(WIDTH, HEADS)
        self.mix = nn.Conv2d(HEADS, HEADS, 3, padding=1)
        self.places = nn.Parameter(torch.randn(TOKENS, WIDTH // HEADS))
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.compute, self.rules = compute, eager.PRESETS["GRADIENT"]

    def heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = self.maps[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        which = ("query", "key", "value", "gate").index(name.rstrip("2"))
        return scale(y, (*self.rules.qkv, 1)[which])

    def scores(self, x: torch.Tensor, which: str = "") -> torch.Tensor:
        return self.heads(f"query{which}", x) @ self.heads(f"key{which}", x).mT * 0.3

    def softmax(self, scores: torch.Tensor) -> torch.Tensor:
        return eager.softmax(scores, self.rules)

    def per_row(self, x: torch.Tensor) -> torch.Tensor:
        """One number for each head and row ``[B, HEADS, T, 1]``."""
        return self.small(x).transpose(1, 2)[..., None]

    def joined(self, y: torch.Tensor) -> torch.Tensor:
        return y.transpose(1, 2).flatten(2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return torch.as_tensor(self.head(x + self.maps["out"](self.compute(self, x))))


def attend(m: Attention, scores: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return m.joined(m.softmax(scores) @ m.heads("value", x))


def _forgetting(m: Attention, x: torch.Tensor) -> torch.Tensor:
    kept = F.logsigmoid(m.small(x)).cumsum(1).transpose(1, 2)
    return attend(m, m.scores(x) + kept[..., :, None] - kept[..., None, :], x)


def _pair_bias(m: Attention, x: torch.Tensor) -> torch.Tensor:
    pairs = x[:, :, None] * x[:, None]
    return attend(m, m.scores(x) + m.small(pairs).movedim(-1, 1), x)


def _cosine(m: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k = m.heads("query", x), m.heads("key", x)
    return attend(m, 5 * (q @ k.mT) / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :]), x)


def _positions(m: Attention, x: torch.Tensor) -> torch.Tensor:
    """As in Transformer-XL and DeBERTa: a query meets keys and embeddings of positions."""
    q = m.heads("query", x)
    return attend(m, (q + 0.1) @ m.heads("key", x).mT * 0.3 + (q - 0.1) @ m.places.mT, x)


def _residual(m: Attention, x: torch.Tensor) -> torch.Tensor:
    """As in RealFormer: scores go on into the next attention's."""
    first = m.scores(x)
    y = x + attend(m, first, x)
    return attend(m, first + m.scores(y, "2"), y)


def _weights_gate(m: Attention, x: torch.Tensor) -> torch.Tensor:
    weights = m.softmax(m.scores(x)) * torch.sigmoid(m.per_row(x))
    return m.joined(weights @ m.heads("value", x))


def _mixture(m: Attention, x: torch.Tensor) -> torch.Tensor:
    share = torch.sigmoid(m.per_row(x))
    weights = share * m.softmax(m.scores(x)) + (1 - share) * m.softmax(m.scores(x, "2"))
    return m.joined(weights @ m.heads("value", x))


def _difference(m: Attention, x: torch.Tensor) -> torch.Tensor:
    weights = m.softmax(m.scores(x)) - 0.4 * m.softmax(m.scores(x, "2"))
    return m.joined(weights @ m.heads("value", x))


def _tanh_of_gate(m: Attention, x: torch.Tensor) -> torch.Tensor:
    return attend(m, m.scores(x), x) * torch.tanh(m.maps["gate"](x))


ATTENTIONS: dict[str, Callable[[Attention, torch.Tensor], torch.Tensor]] = {
    "plain": lambda m, x: attend(m, m.scores(x), x),
    "times a value of the input": lambda m, x: attend(m, m.scores(x) * m.small(x).mean().exp(), x),
    "over a temperature of each query": lambda m, x: attend(m, m.scores(x) / F.softplus(m.per_row(x)), x),
    "times a gate of other scores": lambda m, x: attend(m, m.scores(x) * torch.sigmoid(m.scores(x, "2")), x),
    "cosine": _cosine,
    "convolved": lambda m, x: attend(m, m.mix(m.scores(x)), x),
    "capped": lambda m, x: attend(m, 2 * torch.tanh(m.scores(x) / 2), x),
    "plus forget gates": _forgetting,
    "plus a bias of pairs": _pair_bias,
    "plus positions": _positions,
    "plus the scores before": _residual,
    "weights times a gate": _weights_gate,
    "mixture": _mixture,
    "difference": _difference,
    "output gate": lambda m, x: attend(m, m.scores(x), x) * torch.sigmoid(m.maps["gate"](x)),
    "output gate by silu": lambda m, x: attend(m, m.scores(x), x) * F.silu(m.maps["gate"](x)),
    "output gate by tanh": _tanh_of_gate,
    "output gate by einsum": lambda m, x: m.joined(
        torch.einsum("bhts,bhsd->bhtd", m.softmax(m.scores(x)), m.heads("value", x))
    ) * F.silu(m.maps["gate"](x)),
    "gated values": lambda m, x: m.joined(
        m.softmax(m.scores(x)) @ m.heads("value", x) * torch.sigmoid(m.heads("gate", x))
    ),
}  # fmt: skip


def _called(softmax: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Attention, torch.Tensor], torch.Tensor]:
    """Attention by another function than ``softmax``, but where the rules are those of this file."""

    def compute(m: Attention, x: torch.Tensor) -> torch.Tensor:
        scores, plain = m.scores(x), m.rules is eager.PRESETS["GRADIENT"]
        return m.joined((softmax(scores) if plain else m.softmax(scores)) @ m.heads("value", x))

    return compute


def _absorbed(m: Attention, x: torch.Tensor) -> torch.Tensor:
    """Keys are the input itself, and queries have the keys' projection in them, and the product with their bias."""
    q = scale(m.maps["query"](x), 1 if m.rules is eager.PRESETS["GRADIENT"] else m.rules.qkv[0])
    k = scale(x, 1 if m.rules is eager.PRESETS["GRADIENT"] else m.rules.qkv[1])
    key = m.get_parameter("maps.key.weight")
    bias = m.get_parameter("maps.key.bias")
    scores = 0.3 * ((q @ key) @ k.mT + (q * bias).sum(-1, keepdim=True) * torch.linspace(0, 1, TOKENS))
    return m.joined(m.softmax(scores[:, None]).expand(-1, HEADS, -1, -1) @ m.heads("value", x))


ATTENTIONS |= {
    "absorbed projections": _absorbed,
    "softmin": _called(lambda s: F.softmin(-s, -1)),
    "softmin by places": _called(lambda s: F.softmin(-s, -1, 3, s.dtype)),
    "torch.special": _called(lambda s: torch.special.softmax(s, -1)),
}
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 3, 8, 1, 1, 2, 10]])


def gradient(model: Attention, rules: str | None) -> tuple[torch.Tensor, AppliedReport | None]:
    embedded: list[torch.Tensor] = []

    def hook(_: nn.Module, __: object, out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0]

    with model.embed.register_forward_hook(hook):
        if rules is None:
            logits, report = model(IDS), None
        else:
            with gim.GIM(model, rules=rules) as report:
                logits = model(IDS)
    (found,) = torch.autograd.grad(logits[:, -1, 4].sum(), embedded)
    return found, report


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_written_out_follows_the_rules(name: str, rules: str) -> None:
    model = Attention(ATTENTIONS[name]).double().eval()
    plain, _ = gradient(model, None)
    for _ in range(2):  # watched, and not
        got, report = gradient(model, rules)
        assert report is not None and report.complete and report.watched
        assert report.counts()["attention"][0] == 1 and report.counts()["gated_mlp"][0] == 0
    model.rules = eager.PRESETS[rules]
    want, _ = gradient(model, None)
    assert_close64(got, want, "the rules by hand", FLOAT64_MODEL_RELATIVE)
    assert not torch.allclose(want, plain)


def test_a_computed_bias_inside_the_product_is_named() -> None:
    def compute(m: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k = (m.heads(name, x).flatten(0, 1) for name in ("query", "key"))
        bias = m.small(x[:, :, None] * x[:, None]).movedim(-1, 1).flatten(0, 1)
        return attend(m, torch.baddbmm(bias, q, k.mT).unflatten(0, (-1, HEADS)), x)

    model = Attention(compute).double().eval()
    with pytest.raises(UnsupportedModelError, match="adds a bias that depends on its input"):
        gradient(model, "GIM")
    got, _ = gradient(model, "TSG_ONLY")
    model.rules = eager.PRESETS["TSG_ONLY"]
    assert_close64(got, gradient(model, None)[0], "the rules by hand", FLOAT64_MODEL_RELATIVE)


@pytest.mark.parametrize("name", ["times a value of the input", "cosine", "convolved", "plus a bias of pairs"])
def test_scores_that_no_rule_reaches_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow.Origin, "scores", property(lambda _: False))
    with pytest.raises(UnsupportedModelError, match="softmax over keys"):
        gradient(Attention(ATTENTIONS[name]).double().eval(), "TSG_ONLY")


@pytest.mark.parametrize("both", [False, True], ids=["before", "before and after"])
@pytest.mark.parametrize("how", ["linear", "einsum"])
def test_scores_whose_heads_talk_are_scores(how: str, both: bool) -> None:
    """As in CaiT: a linear map over heads before the softmax, and over what it gives."""
    talks: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "linear": lambda x, weight: F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2),
        "einsum": lambda x, weight: torch.einsum("bhts,gh->bgts", x, weight),
    }

    def compute(m: Attention, x: torch.Tensor) -> torch.Tensor:
        weights = m.softmax(talks[how](m.scores(x), m.mix.weight[:, :, 1, 1]))
        if both:
            weights = talks[how](weights, m.mix.weight[:, :, 0, 1])
        return m.joined(weights @ m.heads("value", x))

    with pytest.raises(UnsupportedModelError, match="softmax over keys"):
        gradient(Attention(compute).double().eval(), "GIM")
