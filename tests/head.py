"""How many positions a model's head runs on, seen below autograd: a hook would have to be shown all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class _Products(TorchDispatchMode):
    def __init__(self, vocabulary: int, seen: list[int]) -> None:
        super().__init__()
        self.vocabulary, self.seen = vocabulary, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and out.shape[-1] == self.vocabulary:
            self.seen.append(out.shape[-2])
        return out


@contextmanager
def heads_run(model: Any, seen: list[int]) -> Iterator[None]:
    """Inside, the rows of every product that gives logits are added to ``seen``."""
    with _Products(model.config.vocab_size, seen):
        yield
