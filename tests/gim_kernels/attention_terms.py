"""How much of its numbers' rounding each result of attention must show: what its error is held against.

To first order, when every number that a result is made of is rounded once, each the worst way. The rounding ``u`` is
that of scores and sums: half a unit in the last place of float32, or of float64 for float64. Every line is the
derivative of attention's own, with absolute values for signs that nobody knows::

    S = scale Q K^T           err S   = u |scale| |Q| |K|^T
    S' = c tanh(S / c)        err S'  = t err S + u |S'|              t = 1 - (S' / c)^2 is its slope; 1 without c
    t                         err t   = 2 (t err S + u |S'|) |S'| / c^2 + u
    L = S' - LSE              err L   = err S' + u |LSE|              what is kept of a softmax is LSE
    P = exp(L) / rowsum       err P   = P (err L + rowsum(P err L) + u)
    P_T = exp(L / T) / rowsum err P_T = P_T ((err L + rowsum(P_T err L)) / T + u)
    dP = dO V^T               err dP  = u |dO| |V|^T =: u b
    delta = rowsum(P_T dP)    err delta = rowsum(err P_T |dP - delta| + P_T u b)
    dS' = P_T (dP - delta)    err dS' = err P_T |dP - delta| + P_T (u b + u rowsum(P b) + err delta)
    dS = t dS'                err dS  = t err dS' + |dS'| err t
    O = P V, dQ = dS K, ..    err P |V| + u sum_k |sum_{l <= k} P_l V_l|, ..     sums of rows have their partial sums

``rowsum(P b)`` bounds ``rowsum(dO O)``, by which dP may be shifted. Where scores are large over T, where dP and delta
cancel, or where a sum over queries does, these say by how much; a wrong formula is no rounding and is not in them.
Products take their factors P and dS in the dtype of the tensors, which rounds them once more. Partial sums matter where
rows repeat one another, which an expanded tensor's do: each is then rounded the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def _seen(
    batch: int, queries: int, keys: int, causal: bool, window: int | None, key_range: torch.Tensor | None
) -> torch.Tensor:
    """Which key each query sees, ``[B, 1, T, S]``."""
    position, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if causal:
        seen &= column <= position
    if window is not None:
        seen &= column > position - window
    if key_range is not None:
        first, end = key_range.cpu().long().T[..., None, None, None]
        seen &= (column >= first) & (column < end)
    return seen


def _product(left: torch.Tensor, error: torch.Tensor, right: torch.Tensor, u: float) -> torch.Tensor:
    """The error of ``left @ right`` ``[.., M, N]``, one row of ``right`` added after the other."""
    found = error @ right.abs()
    total = torch.zeros_like(found)
    for row in range(right.shape[-2]):
        total.addcmul_(left[..., row : row + 1], right[..., row : row + 1, :])
        found.add_(total.abs(), alpha=u)
    return found


@dataclass(frozen=True)
class _Scores:
    """``S'`` ``[B, HQ, T, S]`` with -inf where a key is hidden and a last column for sinks, and ``t``; their errors.

    ``error`` is that of ``L``. A hidden entry has a finite one, which its weight of 0 takes out of every sum.
    """

    scores: torch.Tensor
    error: torch.Tensor
    slope: torch.Tensor
    slope_error: torch.Tensor
    u: float

    def softmax(self, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``P_T`` and its error; 0 in a row that sees nothing."""
        weights = torch.softmax(self.scores / temperature, -1).nan_to_num(0.0)
        error = (self.error + (weights * self.error).sum(-1, keepdim=True)) / temperature + self.u
        return weights, weights * error


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    sinks: torch.Tensor | None,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
    u: float,
) -> _Scores:
    """The first lines of the derivation, for query and key ``[B, HQ, .., D]``."""
    scores, error = scale * query @ key.mT, u * abs(scale) * query.abs() @ key.abs().mT
    slope, slope_error = torch.ones_like(scores), torch.zeros_like(scores)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap).square()
        slope_error = 2 * (slope * error + u * scores.abs()) * scores.abs() / softcap**2 + u
    error = slope * error + u * scores.abs()
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks.detach().cpu().double()[:, None, None].expand(*scores.shape[:3], 1)
        scores, error = torch.cat([scores, column], -1), torch.cat([error, u * column.abs()], -1)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return _Scores(scores, error + u * lse.abs().nan_to_num(posinf=0.0), slope, slope_error, u)


def terms(
    tensors: dict[str, torch.Tensor],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    key_range: torch.Tensor | None = None,
    softmax_backward: str = "exact",
    temperature: float = 2.0,
    grad_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> dict[str, torch.Tensor]:
    """What rounding makes of a call: see the module.

    Args:
        tensors: query, key, value, grad_out and, where there are, sinks, as attention takes them.
        scale, causal, window, softcap, key_range, softmax_backward, temperature, grad_scale: as attention takes them.

    Returns:
        For the output (``"out"``) and each gradient, float64 of its shape, in units of the tensors' ``eps``.
    """
    dtype = tensors["query"].dtype
    u = 0.5 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps
    query, key, value, grad_out = (tensors[x].detach().cpu().double() for x in ("query", "key", "value", "grad_out"))
    (batch, heads, queries, size), keys = query.shape, key.shape[2]
    group = heads // key.shape[1]
    scale = size**-0.5 if scale is None else scale
    wide_key, wide_value = (x.repeat_interleave(group, 1) for x in (key, value))
    seen, sinks = _seen(batch, queries, keys, causal, window, key_range), tensors.get("sinks")
    given = _scores(query, wide_key, sinks, seen, scale, softcap, u)
    weights, weights_error = given.softmax(1.0)
    softened, softened_error = given.softmax(temperature if softmax_backward == "temperature" else 1.0)

    grad_weights, sizes = grad_out @ wide_value.mT, grad_out.abs() @ wide_value.abs().mT
    if sinks is not None:  # no value
        grad_weights, sizes = (torch.cat([x, x.new_zeros(*x.shape[:3], 1)], -1) for x in (grad_weights, sizes))
    centred = grad_weights - (softened * grad_weights).sum(-1, keepdim=True)
    delta_error = (softened_error * centred.abs() + u * softened * sizes).sum(-1, keepdim=True)
    shift_error = u * (weights * sizes).sum(-1, keepdim=True)
    grad_scores = softened * centred
    grad_scores_error = softened_error * centred.abs() + softened * (u * sizes + shift_error + delta_error)
    if softmax_backward == "constant":
        grad_scores, grad_scores_error = torch.zeros_like(grad_scores), torch.zeros_like(grad_scores)

    # As factors of products they are rounded to the tensors' dtype, by half a unit.
    own, error = (x[..., :keys] for x in (grad_scores, grad_scores_error))
    error = given.slope * (error + 0.5 * own.abs()) + given.slope_error * own.abs()
    own = given.slope * own
    weights, weights_error = weights[..., :keys], (weights_error + 0.5 * weights)[..., :keys]

    def of_keys(x: torch.Tensor) -> torch.Tensor:
        """``[B, HQ, T, ..]`` as ``[B, HK, G T, ..]``: all that is added up for a key."""
        return x.unflatten(1, (-1, group)).flatten(2, 3)

    q_factor, k_factor, v_factor = (abs(factor) for factor in grad_scale)
    found = {
        "out": _product(weights, weights_error, wide_value, u),
        "query": q_factor * abs(scale) * _product(own, error, wide_key, u),
        "key": k_factor * abs(scale) * _product(of_keys(own).mT, of_keys(error).mT, of_keys(query), u),
        "value": v_factor * _product(of_keys(weights).mT, of_keys(weights_error).mT, of_keys(grad_out), u),
    }
    if sinks is not None:
        found["sinks"] = grad_scores_error[..., -1].sum((0, 2))
    return found
