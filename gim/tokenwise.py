"""MLPs that run again in the backward, a tile of tokens at a time.

What maps each token by itself may be run on any part of the tokens. Such modules are found by running them, whatever
their class: nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from gim.parts import anatomy
from gim.patches import attention, norms
from gim.patches.session import Session, original_forward

#: Tokens of a probe, and roundings by which the same token may differ between two batches of tokens.
PROBE_TOKENS = 5
PROBE_ULPS = 16

Forward = Callable[[torch.Tensor], torch.Tensor]


def find_mlps(layer: nn.Module, width: int | None, session: Session) -> list[tuple[str, nn.Module]] | str:
    """The children of a layer that are MLPs: they map ``[B, T, width]`` to the same shape, each token by itself.

    Args:
        layer: a decoder layer with its weights; inside a context or not.
        width: of the hidden states.
        session: its counts are as before afterwards, for a probe is no call of the model.

    Returns:
        Names and modules, or the reason, in words, why there is none.
    """
    if width is None:
        return "the model's config does not tell the width of its hidden states"
    found, reason = [], "has no child that maps each token by itself, with one tensor in and one out"
    counts = [(row, row.calls, row.engine) for row in session.report.applications]
    try:
        for name, child in layer.named_children():
            matrices = [parameter for parameter in child.parameters() if parameter.dim() >= 2]
            if len(matrices) < 2 or attention.attention_modules(child):
                continue
            if any(parameter.dim() > 2 for parameter in matrices) or any(
                isinstance(module, nn.ModuleList) for module in anatomy.of(child).modules.values()
            ):
                reason = f"its {name} ({type(child).__name__}) is a mixture of experts, not one MLP for every token"
                continue
            if maps_each_token(child, width, layer):
                found.append((name, child))
    finally:
        for row, calls, engine in counts:
            row.calls, row.engine = calls, engine
    return found or reason


@torch.no_grad()
def maps_each_token(module: nn.Module, width: int, layer: nn.Module) -> bool:
    """Whether a module's output at a token depends on that token alone, found by feeding it numbers."""
    # Quantised weights are integers: the layer's norms then tell the dtype of what it computes.
    parameters = (*module.parameters(), *layer.parameters())
    anchor = next((parameter for parameter in parameters if parameter.dtype.is_floating_point), None)
    if anchor is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(anchor.device, anchor.dtype)
    forward = original_forward(module)
    try:
        whole, flipped, part = forward(x), forward(x.flip(1)), forward(x[:, 1:3])
    except Exception:  # it takes something else than one tensor of tokens
        return False
    if not all(isinstance(y, torch.Tensor) for y in (whole, flipped, part)) or whole.shape != x.shape:
        return False
    if part.shape != x[:, 1:3].shape or whole.dtype != x.dtype:
        return False
    allowed = PROBE_ULPS * torch.finfo(x.dtype).eps * float(whole.double().abs().nan_to_num().amax())
    pairs = ((whole, flipped.flip(1)), (whole[:, 1:3], part))
    return all(torch.allclose(a.double(), b.double(), rtol=0.0, atol=allowed, equal_nan=True) for a, b in pairs)


def in_backward() -> bool:
    """Whether a backward is running on this thread: what runs now is run again."""
    return torch._C._current_graph_task_id() != -1


def in_tiles(forward: Forward, x: torch.Tensor, tile: int | None) -> torch.Tensor:
    """``forward(x)`` for ``[B, T, H]``, ``tile`` tokens at a time."""
    if tile is None or tile >= x.shape[1]:
        return forward(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[1], tile):
        y[:, start : start + tile] = forward(x[:, start : start + tile])
    return y


class _Mark(torch.autograd.Function):
    """The identity in the forward; in the backward, the gradient of ``forward``, which runs again.

    Only its input is kept. It comes before :class:`_Compute`, so that a checkpoint around both, which stops once it
    has everything that was saved, need not run the MLP a second time only to reach its end.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Forward, tile: int | None, every_tile: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.forward, ctx.tile, ctx.every_tile = forward, tile, every_tile
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        (grad_y,) = grads
        tile = x.shape[1] if ctx.tile is None else min(ctx.tile, x.shape[1])
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if tile < x.shape[1] else None
        starts = range(0, x.shape[1], tile)
        for start in starts if ctx.every_tile else starts[:2]:
            tokens = slice(start, start + tile)
            leaf = x[:, tokens].detach().requires_grad_(True)
            with torch.enable_grad():
                y = ctx.forward(leaf)
            (grad,) = torch.autograd.grad(y, leaf, grad_y[:, tokens])
            del y
            if grad_x is None:
                return grad, None, None, None
            grad_x[:, tokens] = grad
        return grad_x, None, None, None


class _Compute(torch.autograd.Function):
    """An MLP's output in the forward; in the backward the identity, for :class:`_Mark` does the work."""

    @staticmethod
    def forward(ctx: Any, marked: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def run_again(
    source: torch.Tensor,
    again: Forward,
    compute: Callable[[], torch.Tensor],
    tile: int | None,
    every_tile: bool = True,
) -> torch.Tensor:
    """``compute()``, whose gradient with respect to ``source`` comes from running ``again(source)`` in tiles.

    Args:
        source: ``[B, T, H]``, kept for the backward.
        again: from ``source`` to what ``compute`` gives, each token by itself.
        compute: the output, ``[B, T, H]``.
        tile: tokens at a time; None for all at once.
        every_tile: False runs two tiles for all, which on tensors without data take the same memory.
    """
    return _Compute.apply(_Mark.apply(source, again, tile, every_tile), compute)


class NormBefore:
    """The norm whose output a layer's MLP takes, found as the model runs: the tensor itself is the proof.

    With it, a tile is a few tokens of the norm's input, and neither its output nor its gradient is ever whole.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor, Forward] | None = None

    def watch(self, norm: nn.Module, session: Session) -> None:
        """Remember what this norm was called with, until its MLP has asked."""
        forward = norm.forward

        def run(hidden: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
            y = forward(hidden, *others, **named)
            if torch.is_grad_enabled() and not others and not named:
                self._last = (hidden, y, forward)
            return y

        session.replace_forward(norm, run)

    def take(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Forward] | None:
        """The input and the forward of the norm that gave ``hidden``, or None where none did."""
        last, self._last = self._last, None
        return (last[0], last[2]) if last is not None and last[1] is hidden else None

    def forget(self) -> None:
        """Hold no tensor any more."""
        self._last = None


def norms_of(layer: nn.Module) -> list[nn.Module]:
    """The norms among a layer's own children."""
    return [child for child in layer.children() if norms.looks_like_norm(child)]
