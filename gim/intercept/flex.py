"""FlexAttention, whose scores and mask a model gives as functions: its handler.

The functions are the model's own and may be anything, so no kernel of ours knows them. Queries are taken block by
block, and each block is computed again in the backward: what lives at once is BLOCK x S and not T x S.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import CellType, FrameType, FunctionType
from typing import Any

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention import flex_attention
from torch.utils.checkpoint import checkpoint

from gim.applied import UnsupportedModelError
from gim.intercept.attention import through_scores
from gim.intercept.frames import Paused, running
from gim.intercept.session import Session
from gim.intercept.sites import SITES
from gim_kernels.reference import attention_weights, scale_gradient

#: Scores that exist at once, over all rows and heads; a block has one query at least.
BLOCK_SCORES = 2**24

#: Frames that function modes of the user's may put between FlexAttention and its handler.
_MODES = 16

_Change = Callable[..., torch.Tensor]


def _flex_attention(
    session: Session,
    func: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: _Change,
    block_mask: tuple[Any, ...],
    scale: float,
    *others: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator below ``flex_attention``: output ``[B, HQ, T, Dv]``, logsumexp and maximum ``[B, HQ, T]``.

    The two statistics are of base 2, as the operator's own.
    """
    captured = [*others[1:], *(one for name, one in named.items() if name != "kernel_options")]
    if any(captured):
        session.refuse("calls flex_attention in compiled code, whose functions hold tensors that gim cannot reach")
        return func(query, key, value, score_mod, block_mask, scale, *others, **named)
    rules = session.rules
    with Paused(), SITES.acting("attention"):
        q, k, v = (scale_gradient(x, by) for x, by in zip((query, key, value), rules.qkv_scale, strict=True))
        q, k = through_scores(q, k, rules.softmax)
        change, sees = _over_scores(_as_it_is(score_mod), (0,)), _over_scores(_as_it_is(block_mask[-1]), ())
        blocks = _Blocks(block_mask)
        batch, heads, queries, _ = query.shape
        rows = max(1, BLOCK_SCORES // (batch * heads * max(1, key.shape[2])))

        name, said = str(running.frames[-1]), dict[int, torch.Tensor]()

        def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
            scores = _scores(q, k, start, scale, change, sees, blocks)
            seen = scores.detach()
            lse = seen.logsumexp(-1)
            if not torch.equal(said.setdefault(start, lse), lse):
                raise UnsupportedModelError(
                    f"{name}: the functions of flex_attention give other scores in the backward than in the forward: "
                    "what they hold has changed in between"
                )
            with SITES.acting("attention"):  # in the backward too, which may run inside a forward
                weights = attention_weights(scores, rules.softmax, rules.temperature)
                return _grouped(weights.to(v.dtype), v), lse, seen.amax(-1)

        made = []
        for start in range(0, queries, rows):
            part = q[:, :, start : start + rows]
            if torch.is_grad_enabled():
                options: dict[str, Any] = {"preserve_rng_state": False, "determinism_check": "none"}
                made.append(checkpoint(block, part, k, v, start, use_reentrant=False, **options))
            else:
                made.append(block(part, k, v, start))
        outs, sums, highest = zip(*made, strict=True)
        out = _laid_out_as(query, outs)
        lse = _NoGradient.apply(torch.cat(sums, 2) / math.log(2), out, name)
        maximum = torch.cat(highest, 2) / math.log(2)
    out = session.heads(out)
    session.fire("attention", "call of flex_attention")
    return out, lse, maximum


def _as_it_is(function: Any) -> Any:
    """A function that goes on to hold what it holds now: those of a loop share their variables."""
    if isinstance(function, tuple):
        return tuple(map(_as_it_is, function))
    if not isinstance(function, FunctionType) or not function.__closure__:
        return function
    cells = []
    for cell in function.__closure__:
        try:
            held = cell.cell_contents
        except ValueError:  # an empty one
            held = cell
        else:
            held = CellType(_as_it_is(held) if held is not function else held)
        cells.append(held)
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class _Blocks:
    """Which blocks of scores a mask keeps: all of a full one, what its function says of a partial one.

    Args:
        mask: a ``BlockMask`` as a tuple: tokens of queries and keys; for each row of blocks, how many partial ones are
            kept and which, and the same of full ones; at its end the sizes of a block and the function.
    """

    def __init__(self, mask: tuple[Any, ...]) -> None:
        _, keys, count, index, full_count, full_index = mask[:6]
        self._query_size, self._key_size = mask[-3:-1]
        columns = -(-keys // self._key_size)
        self._partial = _kept(count, index, columns)
        self._full = None if full_count is None else _kept(full_count, full_index, columns)

    def over(self, shown: torch.Tensor, at: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """``shown`` ``[B, H, BLOCK, S]``, what the function says, with what the blocks say."""
        rows, columns = (at // self._query_size)[:, None], place // self._key_size
        shown = shown & self._partial[:, :, rows, columns]
        return shown if self._full is None else shown | self._full[:, :, rows, columns]


def _kept(count: torch.Tensor, index: torch.Tensor, columns: int) -> torch.Tensor:
    """Booleans ``[B, H, rows, columns]`` of blocks that the first ``count`` of ``index`` name."""
    named = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    kept = torch.zeros(*index.shape[:-1], columns, dtype=torch.int32, device=index.device)
    return kept.scatter_add_(-1, index.long().clamp(max=columns - 1), named.int()) > 0


def _over_scores(function: _Change, first: tuple[int, ...]) -> _Change:
    """A function of one score's place, and of the score where ``first`` says so, over all of a block."""
    over: _Change = flex_attention._vmap_for_bhqkv(function, prefix=first)
    return over


def _scores(
    query: torch.Tensor, key: torch.Tensor, start: int, scale: float, change: _Change, sees: _Change, blocks: _Blocks
) -> torch.Tensor:
    """What the softmax is of, ``[B, HQ, BLOCK, S]``, in float32 at least; the first query is the ``start``-th."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = _grouped(query.to(wide), key.to(wide).mT) * scale
    batch, heads, queries, keys = scores.shape
    device = scores.device
    row, head, place = (torch.arange(count, device=device) for count in (batch, heads, keys))
    at = torch.arange(start, start + queries, device=device)
    with TransformGetItemToIndex():
        shown = sees(row, head, at, place)
        changed = change(scores, row, head, at, place)
    return torch.where(blocks.over(shown, at, place), changed, -torch.inf).to(wide)


def _grouped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``[B, HQ, N, X] @ [B or 1, HK, X, Y]``, where the heads of the right are shared by groups of the left's."""
    batch, heads, count, _ = left.shape
    shared = right.shape[1]
    out = left.reshape(batch, shared, heads // shared * count, -1) @ right
    return out.reshape(batch, heads, count, -1)


def _laid_out_as(query: torch.Tensor, outs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Blocks ``[B, HQ, BLOCK, Dv]`` together, in memory in the order of the query's axes, as torch's operator is."""
    steps = query.stride()
    order = sorted(range(4), key=lambda axis: (-steps[axis], axis))
    whole = torch.cat([one.permute(order) for one in outs], order.index(2))
    return whole.permute([order.index(axis) for axis in range(4)])


class _NoGradient(torch.autograd.Function):
    """A statistic of an attention that is handed out, and an error where a gradient comes back through it."""

    @staticmethod
    def forward(ctx: Any, statistic: torch.Tensor, out: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        ctx.set_materialize_grads(False)
        return statistic.view_as(statistic)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, None]:
        if grads[0] is not None:
            raise UnsupportedModelError(
                f"{ctx.name}: a gradient flows through the logsumexp of flex_attention, for which there is no rule"
            )
        return None, None, None


def _requires_grad(session: Session, func: Callable[..., Any], tensor: torch.Tensor) -> bool:
    """``tensor.requires_grad``; not so to FlexAttention, which refuses gradients on CPUs that are ours to compute."""
    caller: FrameType | None = sys._getframe(2)
    for _ in range(_MODES):  # a user's own function modes stand in between
        if caller is None or caller.f_code is flex_attention._validate_device.__code__:
            return caller is None and func(tensor)
        caller = caller.f_back
    asked: bool = func(tensor)
    return asked


HANDLERS: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.flex_attention: _flex_attention,
    torch.Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
}
