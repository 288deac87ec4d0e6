"""Watches what a model computes, operator by operator, for anything that a GIM rule should act on and does not.

It knows nothing of how the package recognises: it sees the operators of a forward pass below autograd.
What the package runs shows up as its own operators; a softmax over keys, a statistic or a product with an activation
that shows up as operators of torch is one that no rule reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gim.patches import gated_mlps, products

aten = torch.ops.aten
SOFTMAX = {aten._softmax.default, aten._safe_softmax.default}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
    aten._scaled_dot_product_efficient_attention.default,
}
STATISTICS = {
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten.native_group_norm.default,
    aten.rsqrt.default,
    aten.var.correction,
    aten.std.correction,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
}
ACTIVATIONS = {aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default}
PRODUCTS = {aten.mul.Tensor, aten.mul_.Tensor}


@dataclass
class Findings(TorchDispatchMode):
    """Operators that a rule should have acted on, each as (module, what).

    Args:
        tokens: T; a softmax whose last axis is that long is one over keys.
    """

    tokens: int
    found: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self._activated: dict[int, torch.Tensor] = {}  # held, so that no id is used twice
        self._sources: dict[int, torch.Tensor] = {}  # what an activation was computed from, past constant factors
        self.columns = (self.tokens, self.tokens + 1)  # a sink is a column more
        self.attending: set[str] = set()
        self.ours = 0

    def leave(self) -> None:
        """A module has finished."""
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        where = self.stack[-1] if self.stack else ""
        if (func in SOFTMAX and args[0].dim() >= 3 and args[0].shape[-1] in self.columns) or func in ATTENTION:
            self.found.add((where, "softmax over keys"))
        elif func in STATISTICS:
            self.found.add((where, f"statistic by {func.overloadpacket.__name__}"))
        elif func in ACTIVATIONS:
            self._activated[id(out)] = out
            self._sources[id(out)] = self._sources.get(id(args[0]), args[0])
        elif func in PRODUCTS:
            self._product(where, out, *args[:2])
        return out

    def _product(self, where: str, out: torch.Tensor, first: torch.Tensor, second: Any) -> None:
        if not isinstance(second, torch.Tensor) or second.dim() == 0:
            self._sources[id(out)] = self._sources.get(id(first), first)
            self._activated.update({id(out): out} if id(first) in self._activated else {})
        elif first.shape == second.shape and first.dim() >= 2 and first.shape[-1] > 1:
            pairs = [(first, second), (second, first)]
            if any(self._sources.get(id(a)) is b for a, b in pairs):
                self._activated[id(out)] = out  # x times a function of x is an activation
                self._sources[id(out)] = self._sources[id(first if id(first) in self._sources else second)]
            elif any(id(a) in self._activated for a, _ in pairs) and where not in self.attending and not self.ours:
                self.found.add((where, "product with an activation"))


@contextmanager
def watching(model: nn.Module, tokens: int) -> Iterator[Findings]:
    """Watch the forward passes of a model over ``tokens`` tokens."""
    findings = Findings(tokens)
    handles = []
    # An attention module that multiplies its output by a sigmoid is no gated MLP: no rule is about it.
    findings.attending = {name for name, module in model.named_modules() if "Attention" in type(module).__name__}

    def own(*arguments: Any) -> torch.Tensor:
        """Products of activations that the kernels do not have run in PyTorch, and are the package's own too."""
        findings.ours += 1
        try:
            return original(*arguments)
        finally:
            findings.ours -= 1

    original = products.product
    patch = pytest.MonkeyPatch()
    for home in (products, gated_mlps):
        patch.setattr(home, "product", own)
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: findings.stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: findings.leave(), always_call=True))
    try:
        with findings:
            yield findings
    finally:
        patch.undo()
        for handle in handles:
            handle.remove()
