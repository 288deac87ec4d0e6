"""Rows chosen from a trained table: an input where they go alone, weights beside one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gim
from gim.applied import AppliedReport
from gim_kernels.budget import relative_error
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

WIDTH, HIDDEN, EXPERTS = 16, 24, 3
IDS = torch.tensor([[4, 1, 3, 1, 0], [2, 2, 5, 6, 1]])

Lookup = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOOKUPS: dict[str, Lookup] = {
    "embedding": lambda table, at: F.embedding(at, table),
    "index": lambda table, at: table[at],
    "index and slice": lambda table, at: table[at, :],
    "index_select": lambda table, at: table.index_select(0, at.flatten()).unflatten(0, at.shape),
    "gather": lambda table, at: table.gather(0, at.reshape(-1, 1).expand(-1, WIDTH)).unflatten(0, at.shape),
    "product": lambda table, at: F.one_hot(at, len(table)).to(table.dtype) @ table,
}


def _half(x: torch.Tensor) -> torch.Tensor:
    return x / 2 + x.detach() / 2


class Model(nn.Module):
    """A token's row and a position's, a norm written out, attention and a gate, over experts chosen by a token's id.

    Where it is ``by_hand``, the rules are in its own code.
    """

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / 4)

        self.table, self.places = weight(8, WIDTH), weight(8, WIDTH)
        self.qkv = weight(3, WIDTH, WIDTH)
        self.gates, self.ups = weight(EXPERTS, WIDTH, HIDDEN), weight(EXPERTS, WIDTH, HIDDEN)
        self.scales = weight(EXPERTS, WIDTH)
        self.down = weight(HIDDEN, WIDTH)
        self.lookup, self.by_hand = lookup, False

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        statistic = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (statistic.detach() if self.by_hand else statistic)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lookup(self.table, ids) + self.lookup(self.places, torch.arange(ids.shape[1]))
        h = self.norm(x)
        q, k, v = (h @ weight for weight in self.qkv)
        if self.by_hand:
            weights = torch.softmax(q @ k.mT / WIDTH**0.5, -1).detach()
            x = x + weights @ _half(v)
        else:
            x = x + F.scaled_dot_product_attention(q, k, v)
        h = self.norm(x)
        chosen = ids % EXPERTS
        h = h * self.scales[chosen]
        gate, up = (torch.einsum("btd,btdh->bth", h, experts[chosen]) for experts in (self.gates, self.ups))
        if self.by_hand:
            gate, up = _half(gate), _half(up)
        return x + (F.silu(gate) * up) @ self.down


def gradients(model: Model, by_hand: bool = False) -> tuple[tuple[torch.Tensor, ...], AppliedReport | None]:
    model.by_hand, report = by_hand, None
    if by_hand:
        loss = model(IDS)[:, -1].pow(2).sum()
    else:
        with gim.GIM(model, rules="GIM_CONSTANT") as report:
            loss = model(IDS)[:, -1].pow(2).sum()
    return torch.autograd.grad(loss, [model.table, model.places, model.gates, model.scales]), report


@pytest.mark.parametrize("way", LOOKUPS)
def test_the_gradient_of_a_table_follows_the_rules(way: str) -> None:
    model = Model(LOOKUPS[way])
    got, report = gradients(model)
    want, _ = gradients(model, by_hand=True)
    for name, one, other in zip(("tokens", "places", "experts", "scales"), got, want, strict=True):
        assert_close64(one, other, f"{way}: {name}", FLOAT64_MODEL_RELATIVE)
    assert report is not None and report.complete
    assert report.counts() == {"attention": (1, 1), "norm": (1, 2), "gated_mlp": (1, 1)}
    model.by_hand = False
    plain = torch.autograd.grad(model(IDS)[:, -1].pow(2).sum(), model.table)[0]
    assert relative_error(got[0], plain) > 1e-3
