"""Every kernel once: what tools that watch a process are given, and what is built ahead for a machine with a GPU.

``python -m benchmarks.once smallest`` runs every kernel on the smallest shapes that have full and cut tiles, under
``compute-sanitizer``; ``... headline`` the three attention kernels at the size of the headline, under ``ncu``.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import gim_kernels

#: Softmax rules of the headline.
RULES = ("temperature", "exact", "constant")


@dataclass(frozen=True)
class Attend:
    """A step of attention: shapes as in :class:`benchmarks.cases.AttentionCase`; ``options`` beyond the rule."""

    rule: str
    head_size: int
    tokens: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, device: torch.device) -> None:
        """Forward and backward."""

        def draw(heads: int) -> torch.Tensor:
            x = torch.randn(1, self.tokens, heads, self.head_size, device=device).to(self.dtype)
            return x.transpose(1, 2).requires_grad_()

        query, key, value = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)
        options: dict[str, Any] = {"causal": True, **dict(self.options)}
        if options.pop("key_range", False):
            options["key_range"] = torch.tensor([[1, self.tokens - 1]], dtype=torch.int32, device=device)
        if options.pop("sinks", False):
            options["sinks"] = torch.zeros(self.heads, device=device)
        out = gim_kernels.attention(query, key, value, softmax_backward=self.rule, engine="triton", **options)  # type: ignore[arg-type]
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out), allow_unused=True)


@dataclass(frozen=True)
class Rows:
    """A step of a norm or a gated product over ``[tokens, width]``."""

    op: str
    tokens: int
    width: int
    dtype: torch.dtype
    frozen: bool = True

    def __call__(self, device: torch.device) -> None:
        """Forward and backward."""
        x, other = (torch.randn(self.tokens, self.width, device=device).to(self.dtype) for _ in range(2))
        x, other, weight = x.requires_grad_(), other.requires_grad_(), x[0].detach()
        if self.op == "gated":
            y = gim_kernels.gated(x, other, "silu", grad_scale=(0.5, 0.5), engine="triton")
            torch.autograd.grad(y, (x, other), torch.ones_like(y))
            return
        if self.op == "rms_norm":
            y = gim_kernels.rms_norm(x, weight, 1e-6, frozen=self.frozen, engine="triton")
        else:
            y = gim_kernels.layer_norm(x, weight, None, 1e-6, frozen=self.frozen, engine="triton")
        torch.autograd.grad(y, x, torch.ones_like(y))


def smallest() -> Iterator[Attend | Rows]:
    """Every kernel, rule and option; with and without descriptors."""
    masks: tuple[tuple[tuple[str, Any], ...], ...] = (
        (),
        (("window", 20), ("key_range", True), ("sinks", True)),
        (("softcap", 5.0),),
    )
    for rule, options in itertools.product(RULES, masks):
        yield Attend(rule, 64, 150, 4, 2, torch.float16, options)
    yield Attend("temperature", 16, 40, 2, 1, torch.float32)
    for op in ("rms_norm", "layer_norm", "gated"):
        yield Rows(op, 3, 200, torch.float16)
    yield Rows("rms_norm", 3, 200, torch.float16, frozen=False)


def headline(tokens: int = 8192) -> Iterator[Attend | Rows]:
    """One step at T = 2, which has each of the three attention kernels once."""
    yield Attend("temperature", 128, tokens, 32, 32, torch.bfloat16)


def built(tokens: int = 512) -> Iterator[Attend | Rows]:
    """What the tables of ``make gpu`` run, at a length for which triton compiles the same code."""
    for rule, size in itertools.product(RULES, (128, 64)):
        for kv_heads in (32, 8):
            yield Attend(rule, size, tokens, 32, kv_heads, torch.bfloat16)
    for width in (4096, 14336):
        for op in ("rms_norm", "layer_norm", "gated"):
            yield Rows(op, tokens, width, torch.bfloat16)
        yield Rows("rms_norm", tokens, width, torch.bfloat16, frozen=False)


def main(arguments: Sequence[str]) -> int:
    """Run ``smallest`` or ``headline``, on the GPU or in triton's interpreter; with ``tiny`` at few tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, *rest = arguments
    chosen = smallest() if kind == "smallest" else headline(64) if "tiny" in rest else headline()
    for one in itertools.islice(chosen, 1) if "tiny" in rest else chosen:
        one(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        sys.stdout.write(f"{one}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
