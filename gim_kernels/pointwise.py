"""Norms and the gated product in plain PyTorch: forward and backward of what Triton fuses on a GPU.

Every function takes and returns plain tensors and knows nothing of autograd; ``gim_kernels.triton`` has functions of
the same names and signatures. Each works through its rows in blocks that stay in the cores' caches, and writes into
its results: fresh memory for whole intermediate tensors would cost more than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch

from gim_kernels.reference import activation_ratio
from gim_kernels.told import tell

#: Rows that are worked through at once; None for all.
Block = slice | None

#: Numbers of a block for each thread: 2 MiB in float32. Smaller ones stay in nearer caches, but threads then wait for
#: one another more often, which costs most where a machine is busy.
NUMBERS_PER_THREAD = 2**19

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
#: Intermediate tensors that :func:`gim_kernels.reference.activation_ratio` holds at once.
_RATIO_TILES = {"silu": 1, "gelu": 2, "gelu_tanh": 3}


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(_wide_dtype(x.dtype))


def _shape(x: torch.Tensor) -> tuple[int, int]:
    """N and D of a tensor of any rank."""
    width = x.shape[-1] if x.dim() else 1
    return x.numel() // max(1, width), width


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as ``[N, D]``."""
    return x.reshape(_shape(x))


def _step(width: int) -> int:
    """Rows of a block."""
    return max(1, NUMBERS_PER_THREAD * torch.get_num_threads() // max(1, width))


def _blocks(rows: int, width: int) -> list[Block]:
    """Rows of ``width`` numbers, a block at a time."""
    step = _step(width)
    return [None] if rows <= step else [slice(start, start + step) for start in range(0, rows, step)]


def _of_several(each: torch.Tensor, shared: torch.Tensor) -> list[tuple[Block, list[Block]]]:
    """Blocks of ``shared`` ``[.., D or 1]``, and where each lies in ``each``: once, or in ``[N, .., D]`` N times."""
    (rows, _), (all_rows, width) = _shape(shared), _shape(each)
    if each.dim() == shared.dim():
        return [(block, [block]) for block in _blocks(rows, width)]
    ends = [(start, min(start + _step(width), rows)) for start in range(0, rows, _step(width))]
    return [(slice(*one), [slice(one[0] + i, one[1] + i) for i in range(0, all_rows, rows)]) for one in ends]


def _laid(blocks: list[Any], *tensors: torch.Tensor | None) -> list[Any]:
    """Tensors as their blocks are taken from them: as they are where one is all, else as ``[N, D or 1]``."""
    whole = blocks in ([None], [(None, [None])])
    return [x if whole or x is None else _rows(x) for x in tensors]


def _at(x: torch.Tensor, block: Block) -> torch.Tensor:
    """A block of a tensor of :func:`_laid`."""
    return x if block is None else x[block]


def _work_tile(out: torch.Tensor) -> torch.Tensor:
    """Where a block of results is computed: in place, or in wider numbers that are rounded at the end."""
    wide = _wide_dtype(out.dtype)
    return out if out.dtype == wide else torch.empty_like(out, dtype=wide)


def _store(tile: torch.Tensor, out: torch.Tensor) -> None:
    """Round a tile of :func:`_work_tile` into its place, where it is not there already."""
    if tile is not out:
        out.copy_(tile)


def _factor(weight: torch.Tensor | None, weight_offset: float) -> torch.Tensor | None:
    """What a norm multiplies by, in wide numbers; None for 1."""
    if weight is None:
        return None
    return _wide(weight) + weight_offset if weight_offset else _wide(weight)


def _bytes(x: torch.Tensor, tiles: int) -> int:
    """Of ``tiles`` blocks of ``x`` in wide numbers."""
    rows, width = _shape(x)
    return tiles * min(rows, _step(width)) * width * _wide_dtype(x.dtype).itemsize


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :class:`gim_kernels.types.PointwiseEngine`."""
    tell("blockwise")
    y, inverse_rms = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=_wide_dtype(x.dtype))
    factor = _factor(weight, weight_offset)
    blocks = _blocks(*_shape(x))
    rows, y_rows, inverse_rows = _laid(blocks, x, y, inverse_rms)
    for block in blocks:
        wide, out, inverse = _wide(_at(rows, block)), _at(y_rows, block), _at(inverse_rows, block)
        tile = _work_tile(out)
        torch.rsqrt(torch.square(wide, out=tile).mean(-1, keepdim=True).add_(eps), out=inverse)
        torch.mul(wide, inverse, out=tile)
        if factor is not None:
            tile.mul_(factor)
        _store(tile, out)
    return y, inverse_rms


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :class:`gim_kernels.types.PointwiseEngine`."""
    tell("blockwise")
    # torch's kernel for CPUs gives its statistics in the dtype of the weight and takes a narrower x as it is; other
    # devices want one dtype. Parameters of any dtype are brought to the wide one of x.
    given = x if x.device.type in ("cpu", "meta") else _wide(x)
    width, wide = x.shape[-1:], _wide_dtype(x.dtype)
    factor = x.new_ones(width, dtype=wide) if weight is None else weight.to(wide)
    shift = None if bias is None else bias.to(wide)
    y, mean, inverse_std = torch.native_layer_norm(given, width, factor, shift, eps)
    return y.to(x.dtype), mean, inverse_std


def norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    weight_offset: float,
    *,
    frozen: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """See :class:`gim_kernels.types.PointwiseEngine`; ``grad_y`` may have one dimension more in front, where x alone
    needs a gradient: several gradients of one output, for which what they share is computed once."""
    need_x, need_weight, need_bias = needs
    width, wide_dtype = grad_y.shape[-1], inverse.dtype
    grad_x = grad_y.new_empty(grad_y.shape) if need_x else None
    grad_weight = grad_y.new_zeros(width, dtype=wide_dtype) if need_weight and x is not None else None
    grad_bias = grad_y.new_zeros(width, dtype=wide_dtype) if need_bias else None
    factor = _factor(weight, weight_offset)
    blocks = _of_several(grad_y, inverse)
    rows, outs, inverses, inputs, means = _laid(blocks, grad_y, grad_x, inverse, x, mean)
    for block, places in blocks:
        scale, normalised = _at(inverses, block), None
        if inputs is not None and (need_weight or not frozen):
            given = _wide(_at(inputs, block))
            normalised = given * scale if means is None else (given - _at(means, block)).mul_(scale)
        for place in places:
            wide = _wide(_at(rows, place))
            if outs is not None:
                out = _at(outs, place)
                tile = _work_tile(out)
                _ = tile.copy_(wide) if factor is None else torch.mul(wide, factor, out=tile)
                along = None if frozen or normalised is None else (tile * normalised).mean(-1, keepdim=True)
                if mean is not None:
                    tile.sub_(tile.mean(-1, keepdim=True))
                if along is not None and normalised is not None:
                    tile.addcmul_(normalised, along, value=-1)
                _store(tile.mul_(scale), out)
            if grad_weight is not None and normalised is not None:
                grad_weight += _rows(normalised * wide).sum(0)
            if grad_bias is not None:
                grad_bias += _rows(wide).sum(0)
    return grad_x, grad_weight, grad_bias


def _activate(gate: torch.Tensor, activation: str, out: torch.Tensor) -> torch.Tensor:
    """``activation(gate)`` into ``out``."""
    if activation == "silu":
        return torch.ops.aten.silu.out(gate, out=out)
    return torch.ops.aten.gelu.out(gate, approximate=_APPROXIMATE[activation], out=out)


def _slope(gate: torch.Tensor, up: torch.Tensor, activation: str, backward: str, out: torch.Tensor) -> torch.Tensor:
    """``up`` times the derivative of the activation at ``gate``, or times what stands for it, into ``out``."""
    if backward == "ratio":
        return torch.mul(up, activation_ratio(gate, activation), out=out)
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(up, gate, approximate=_APPROXIMATE[activation], grad_input=out)


def gated_forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See :class:`gim_kernels.types.PointwiseEngine`."""
    tell("blockwise")
    y = gate.new_empty(gate.shape)
    blocks = _blocks(*_shape(gate))
    gates, ups, rows = _laid(blocks, gate, up, y)
    for block in blocks:
        _activate(_at(gates, block), activation, _at(rows, block)).mul_(_at(ups, block))
    return y


def gated_backward(
    grad_y: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    grad_scale: tuple[float, float],
    activation_backward: str,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """See :class:`gim_kernels.types.PointwiseEngine`; ``grad_y`` may have one dimension more in front: several
    gradients of one output, for which what they share is computed once."""
    grad_gate, grad_up = (grad_y.new_empty(grad_y.shape) if need else None for need in needs)
    blocks = _of_several(grad_y, gate)
    grads, gates, ups, to_gate, to_up = _laid(blocks, grad_y, gate, up, grad_gate, grad_up)
    for block, places in blocks:
        branch, last = _at(gates, block), places[-1]
        # A gradient is multiplied by what is the same for all: it is written where the last one's product goes.
        if to_gate is not None:
            factor = _slope(branch, _at(ups, block), activation, activation_backward, _at(to_gate, last))
            if grad_scale[0] != 1.0:
                factor.mul_(grad_scale[0])
            for place in places:
                torch.mul(factor, _at(grads, place), out=_at(to_gate, place))
        if to_up is not None:
            factor = _activate(branch, activation, _at(to_up, last))
            if grad_scale[1] != 1.0:
                factor.mul_(grad_scale[1])
            for place in places:
                torch.mul(factor, _at(grads, place), out=_at(to_up, place))
    return grad_gate, grad_up


def forward_workspace(x: torch.Tensor) -> int:
    """Bytes that :func:`rms_norm_forward` holds for a moment besides its arguments and results, at most."""
    return _bytes(x, 2 if x.dtype != _wide_dtype(x.dtype) else 0)


def norm_backward_workspace(grad_y: torch.Tensor, frozen: bool, need_weight: bool) -> int:
    """The same of :func:`norm_backward`."""
    tiles = 0 if frozen and not need_weight else 2
    return _bytes(grad_y, tiles + (3 if grad_y.dtype != _wide_dtype(grad_y.dtype) else 0))


def gated_backward_workspace(gate: torch.Tensor, activation: str, activation_backward: str) -> int:
    """The same of :func:`gated_backward`; that of :func:`gated_forward` is nothing."""
    return _bytes(gate, _RATIO_TILES[activation] if activation_backward == "ratio" else 0)
