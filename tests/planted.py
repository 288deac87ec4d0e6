"""What evaluations are held against: a model whose answer depends on known tokens, and the metrics written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

#: The planted model's only interesting answer.
TARGET = 5


class Planted(nn.Module):
    """The target's logit is the sum of weights of the tokens so far; all others are 0. It does not say what embeds."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.rand(vocabulary, generator=generator), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> Any:
        said = torch.zeros(*input_ids.shape, len(self.weight))
        said[..., TARGET] = self.weight[input_ids].cumsum(-1)
        return SimpleNamespace(logits=said)


class Shifted(nn.Module):
    """Another model with a constant added to all of its logits."""

    def __init__(self, model: nn.Module, constant: float) -> None:
        super().__init__()
        self.inner = model
        self.constant = constant

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()  # type: ignore[operator]

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.inner(input_ids=input_ids).logits + self.constant)


def measured(logits: np.ndarray, target: int, foil: int, measure: str) -> float:
    """f under a measure, from float64 logits [V]."""
    total = np.exp(logits - logits.max())
    share = total[target] / total.sum()
    return {
        "logprob": float(np.log(share)),
        "logit": float(logits[target]),
        "logodds": float(np.log(share / (1 - share))),
        "contrast": float(logits[target] - logits[foil]),
    }[measure]


class Truth:
    """Every metric of one prompt, one float64 forward after another, in the words of the definitions."""

    def __init__(self, model: nn.Module, ids: list[int], base: int) -> None:
        self.model, self.ids, self.base = model, ids, base
        self.known: dict[frozenset[int], np.ndarray] = {}

    def logits(self, without: frozenset[int]) -> np.ndarray:
        """Of the last position [V], some tokens replaced."""
        if without not in self.known:
            row = torch.tensor([[self.base if place in without else one for place, one in enumerate(self.ids)]])
            with torch.no_grad():
                self.known[without] = self.model(input_ids=row).logits[0, -1].double().numpy()
        return self.known[without]

    def metrics(self, scores: list[float], target: int, foil: int, measure: str, *, paper: bool) -> dict[str, float]:
        """The metrics of a method's scores [T]."""

        def f(without: list[int]) -> float:
            return measured(self.logits(frozenset(without)), target, foil, measure)

        inner = range(1, len(self.ids) - 1)
        order = sorted(inner, key=lambda place: (-scores[place], place))
        full = f([])
        over = full if measure == "logit" else 1.0
        falls = np.zeros(50) if paper else np.zeros(min(50, len(order)))
        for count in range(1, min(50, len(order)) + 1):
            falls[count - 1] = (full - f(order[:count])) / over
        shares = (0.5, 0.8, 0.9, 0.95, 0.99)
        keeps = [(full - f(order[::-1][: int(share * len(order))])) / over for share in shares]
        alone = np.array([full - f([place]) for place in inner])
        return {
            "comprehensiveness": float(falls.mean()),
            "sufficiency": float(np.mean(keeps)),
            "loo_correlation": float(np.corrcoef(alone, [scores[place] for place in inner])[0, 1]),
        }
