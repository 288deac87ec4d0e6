"""What one backward also tells of a model's inside: of the stream at each layer, or of each head's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn

from gim.applied import UnsupportedModelError
from gim.intercept.flow import mark, origin
from gim.intercept.frames import in_backward
from gim.intercept.gates import Changes
from gim.intercept.session import Session, session_of
from gim.parts import anatomy
from gim.parts.calling import Rows
from gim.parts.layers import stream_at
from gim.targets import Per

#: Tokens whose numbers are multiplied at once: whole products in float32 may be larger than what the backward keeps.
TILE = 4096


class _Tap(torch.autograd.Function):
    """A value as it is, which is seen beside its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, see: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.see(ctx.saved_tensors[0], grads[0])
        return grads[0], None


def _tapped(x: torch.Tensor, see: Callable[[torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
    found = origin(x)
    out: torch.Tensor = _Tap.apply(x, see)
    mark(out, found)  # to the rules it is what it was
    return out


class Taps:
    """Scores of one forward and backward: what was computed, times its gradient.

    A checkpoint's second run is the same run to it: what is seen in it takes the place of what was seen in the first.

    Args:
        per: ``"layer"``: of the stream that each layer reads, by token; ``"head"``: of the output of each head of each
            layer's attention, tokens summed.
        layers: with their names.
        rows: what the model reads; a wrapper may have put tokens before those.
    """

    def __init__(self, per: Per, layers: tuple[tuple[str, nn.Module], ...], rows: Rows) -> None:
        self._per = per
        self._layers = layers
        self._rows = rows
        self._tokens = rows.ids.shape[1]
        self._inside: list[int] = []
        #: Shape of the scores of each row that was computed, and the scores where a gradient came.
        self._shapes: dict[int, torch.Size] = {}
        self._found: dict[int, torch.Tensor] = {}
        self._ran: dict[int, int] = {}

    def begin(self) -> None:
        """Forget what was seen: a forward is about to run."""
        for seen in (self._shapes, self._found, self._ran):
            seen.clear()

    def of_layer(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        """A layer's ``forward``, looked at."""
        forward = layer.forward

        def run(*inputs: Any, **named: Any) -> Any:
            again = in_backward()
            self._ran[index] = self._ran.get(index, 0) + (not again)
            self._inside.append(index)
            try:
                if self._per == "head" or not torch.is_grad_enabled():
                    return forward(*inputs, **named)
                at = stream_at(inputs, named)
                if isinstance(at, str):
                    named = {**named, at: self._stream(index, named[at])}
                else:
                    at = at or 0
                    seen = self._stream(index, inputs[at] if inputs else None)
                    inputs = (*inputs[:at], seen, *inputs[at + 1 :])
                return forward(*inputs, **named)
            finally:
                self._inside.pop()

        return run

    def _stream(self, row: int, x: Any) -> torch.Tensor:
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[1] < self._tokens:
            shape = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            self._refuse(row, f"what it reads is {shape}, not a stream of [B, T, width]")
        stream = x[:, -self._tokens :]
        self._shapes[row] = stream.shape[:2]
        if not x.requires_grad:
            return x

        def see(x: torch.Tensor, grad: torch.Tensor) -> None:
            self._found[row] = _by_token(x[:, -self._tokens :], grad[:, -self._tokens :])

        return _tapped(x, see)

    def heads(self, out: torch.Tensor) -> torch.Tensor:
        """An attention's output ``[B, H, T, D]``, looked at where it is that of a layer."""
        if not self._inside:
            return out
        row = self._inside[-1]
        if out.dim() != 4:
            self._refuse(row, f"its attention's output is {list(out.shape)}, not [B, heads, T, head size]")
        if row in self._shapes and not in_backward():
            self._refuse(row, "its attention runs more than once, so a head has more than one output")
        self._shapes[row] = torch.Size([self._rows.count, out.shape[1]])
        if not out.requires_grad:
            return out

        def see(out: torch.Tensor, grad: torch.Tensor) -> None:
            self._found[row] = self._rows.summed(_by_token(out, grad))

        return _tapped(out, see)

    def _refuse(self, index: int, why: str) -> None:
        raise UnsupportedModelError(f"{self._layers[index][0]}: {why}: per={self._per!r} cannot be told of it")

    def scores(self, device: torch.device) -> torch.Tensor:
        """What was seen since :meth:`begin`: ``[B, layers, T]``, or ``[B, layers, heads]``.

        Where no gradient came, nothing that is explained depends on it, and the score is 0.

        Raises:
            UnsupportedModelError: a layer did not run once, or its attention in a way that has no heads to see.
        """
        for index, (_, layer) in enumerate(self._layers):
            times = self._ran.get(index, 0)
            if times != 1:
                self._refuse(index, f"{type(layer).__name__} runs {times} times in a forward")
            if index not in self._shapes:
                self._refuse(index, f"no attention of {type(layer).__name__} was seen head by head")
        first = self._shapes[0]
        for row, shape in self._shapes.items():
            if shape != first:
                self._refuse(row, f"has {shape[1]} heads and {self._layers[0][0]} has {first[1]}")
        wide = next((x.dtype for x in self._found.values()), torch.float32)
        rows = [self._found.get(row) for row in sorted(self._shapes)]
        found = [torch.zeros(first, dtype=wide, device=device) if x is None else x.to(device) for x in rows]
        return torch.stack(found, 1)


@torch.no_grad()
def _by_token(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``(x * grad).sum(-1)`` in float32, or float64 of float64, in tiles of the last dimension but one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(x.shape[:-1], dtype=wide, device=x.device)
    for start in range(0, x.shape[-2], TILE):
        tokens = slice(start, start + TILE)
        out[..., tokens] = (x[..., tokens, :].to(wide) * grad[..., tokens, :].to(wide)).sum(-1)
    return out


@contextmanager
def applied(per: Per, model: nn.Module, rows: Rows) -> Iterator[Taps]:
    """Inside, forward and backward of a model under its open session are looked at.

    A plan is applied around this, so that a checkpoint keeps nothing besides for it.

    Raises:
        UnsupportedModelError: the model has no layers.
    """
    session: Session | None = session_of(model)
    assert session is not None, "a GIM context is open around this"
    layers = anatomy.of(model).layers
    if not layers:
        raise UnsupportedModelError(
            f"per={per!r} needs a list of layers, and {type(model).__name__} has no ModuleList whose entries all "
            "contain attention"
        )
    taps = Taps(per, layers, rows)
    with closing(Changes(session)) as changes:
        for index, (_, layer) in enumerate(layers):
            changes.replace_forward(layer, taps.of_layer(index, layer))
        if per == "head":
            session.see_heads = taps.heads
        try:
            yield taps
        finally:
            session.see_heads = None
