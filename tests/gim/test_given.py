"""What a forward is given: inputs that are parameters, weights that are none, and derivatives that follow no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import gim
from tests import families

WIDTH = 32


class Own(torch.Tensor):
    """A class of somebody's own."""


def inputs() -> torch.Tensor:
    return torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Whole(nn.Module):
    """A norm, attention and a gate, of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(WIDTH, 3 * WIDTH).double()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, WIDTH).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        q, k, v = self.wide(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        g, u, _ = self.wide(x).chunk(3, -1)
        return F.silu(g) * u


@pytest.mark.parametrize("rules", ["GIM", "FREEZE_ONLY", "SCALES_ONLY"])
@pytest.mark.parametrize("first", [False, True], ids=["watched", "after another"])
@pytest.mark.parametrize("what", ["leaf", "computed", "joined", "in a dict", "frozen weights"])
def test_an_input_may_be_a_parameter_of_somebodys(what: str, first: bool, rules: str) -> None:
    """A soft prompt, or embeddings that are optimised: as inputs, they are none of the model's weights."""

    def made(x: torch.Tensor) -> torch.Tensor:
        return {"computed": lambda: x * 1.0, "joined": lambda: torch.cat([x[:, :3], x[:, 3:]], 1)}.get(
            what, lambda: x
        )()

    class Given(Whole):
        def forward(self, x: Any) -> torch.Tensor:
            return super().forward(x["x"] if isinstance(x, dict) else x)

    model, values = Given(), inputs().detach()
    model.requires_grad_(what != "frozen weights")

    def asked(x: torch.Tensor) -> torch.Tensor:
        with gim.GIM(model, rules=rules) as report:
            y = model({"x": x} if what == "in a dict" else made(x))
        assert report.complete and report.watched
        grad = torch.autograd.grad(y.square().sum(), x)[0]
        assert report.counts()["norm"] == ((1, 1) if rules != "SCALES_ONLY" else report.counts()["norm"])
        return grad

    if first:
        want = asked(values.clone().requires_grad_())
        got = asked(nn.Parameter(values.clone()))
    else:
        got = asked(nn.Parameter(values.clone()))
        want = asked(values.clone().requires_grad_())
    assert torch.equal(got, want)


def test_a_weight_that_is_an_argument_is_still_a_weight() -> None:
    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x) * weight

    model = Applied()
    with gim.GIM(model) as report:
        model(inputs().requires_grad_(), model.weight)
    assert report.counts()["gated_mlp"] == (0, 0) and report.complete


@pytest.mark.parametrize("what", ["detached", "leaves", "computed", "stepped"])
@pytest.mark.parametrize("first", [False, True], ids=["watched", "after another"])
def test_weights_that_are_put_in_for_one_call_are_weights(what: str, first: bool) -> None:
    """``torch.func.functional_call``: as in meta-learning, and influence functions."""
    model = families.make("llama", torch.float64)
    x = model.get_input_embeddings()(torch.arange(4, 13)[None]).detach().requires_grad_()
    made: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "detached": torch.Tensor.detach,
        "leaves": lambda p: p.detach().clone().requires_grad_(),
        "computed": lambda p: p * 1,
        "stepped": lambda p: p.detach().clone().requires_grad_() * 1,
    }
    weights = {name: made[what](one) for name, one in model.named_parameters()}

    def asked(call: Any) -> torch.Tensor:
        with gim.GIM(model) as report:
            logits = call(inputs_embeds=x, use_cache=False).logits
        assert report.counts() == {"attention": (3, 3), "norm": (7, 7), "gated_mlp": (3, 3)}
        return torch.autograd.grad(logits[0, -1, 3], x)[0]

    def functional(**named: Any) -> Any:
        return torch.func.functional_call(model, weights, (), named)

    calls = (model, functional) if first else (functional, model)
    one, other = (asked(call) for call in calls)
    assert torch.equal(one, other)


def test_forward_mode_derivatives_are_refused() -> None:
    model, x = Whole(), inputs()
    with gim.GIM(model), pytest.raises(RuntimeError, match="forward-mode derivatives"):
        torch.func.jvp(model, (x,), (x,))
    with gim.GIM(model), pytest.raises(RuntimeError, match="forward-mode derivatives"), forward_ad.dual_level():
        model(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("how", ["detached", "unused", "under no_grad", "numbers", "of the sum"])
def test_weights_that_are_made_to_be_shown_meet_no_values(how: str) -> None:
    """Beside attention by torch's function; where a gradient leads back to them, they are still refused."""

    class Showing(Whole):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.wide(x).chunk(3, -1)
            with torch.set_grad_enabled(how != "under no_grad"):
                weights = F.softmax(q @ k.mT * WIDTH**-0.5, -1)
            shown = {"detached": weights.detach, "numbers": weights.tolist, "under no_grad": lambda: weights}
            self.shown = shown[how]() if how in shown else None
            out = F.scaled_dot_product_attention(q, k, v)
            return out + weights.square().sum() if how == "of the sum" else out

    model, x = Showing(), inputs().requires_grad_()
    if how == "of the sum":
        with gim.GIM(model), pytest.raises(gim.UnsupportedModelError, match="attention weights to its values in a way"):
            model(x)
        return
    found = []
    for one in (model, Plain()):
        with gim.GIM(one) as report:
            out = one(x)
        assert report.complete
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Plain(Whole):
    """Its attention alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.wide(x).chunk(3, -1))


def test_an_input_may_be_of_a_class_of_somebodys() -> None:
    model = Whole().requires_grad_(False)
    found = []
    for one in (inputs(), inputs().as_subclass(Own)):
        leaf = one.requires_grad_()
        with gim.GIM(model) as report:
            (grad,) = torch.autograd.grad(model(leaf).sum(), leaf)
        assert report.counts() == {"attention": (1, 1), "norm": (1, 1), "gated_mlp": (1, 1)}
        found.append(grad)
    assert torch.equal(found[1].as_subclass(torch.Tensor), found[0])
