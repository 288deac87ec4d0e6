"""One prompt as a method sees it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from gim.evaluation.perturbation import Masked


@dataclass(frozen=True)
class Case:
    """One prompt to score.

    Args:
        model: the model whose target logit at the last position is explained.
        ids: the prompt ``[T]``, on the model's device.
        target: id of the explained token.
        baseline_id: the token that stands for "nothing".
        masked: what the model says on masked inputs, shared by all methods.
        seed: of everything that is drawn.
        what: how to call the example in a message.
        key: what tells the example's draws from another's.
    """

    model: nn.Module
    ids: torch.Tensor
    target: int
    baseline_id: int
    masked: Masked
    seed: int
    what: str
    key: str

    def draw(self, purpose: str) -> int:
        """A seed for one method on this example, which depends on nothing else that is evaluated."""
        content = f"{self.seed} {purpose} {self.key}".encode()
        return int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
