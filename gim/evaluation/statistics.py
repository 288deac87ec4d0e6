"""How sure a mean over examples is: bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gim.evaluation.extras import need

#: Probability that an interval covers the mean of the examples' population.
LEVEL = 0.95
#: Resamples of a bootstrap.
RESAMPLES = 9999
#: Share of a number by which sums of the same examples may differ.
ROUNDING = 1e-12
#: Examples of an interval, at least: that of two is their range, whatever the level.
LEAST = 3
#: Numbers of resamples that are held at once.
HELD = 2**24


@dataclass(frozen=True)
class Estimate:
    """A mean over examples.

    Args:
        n: examples.
        mean: of their values, or another number that all of them give.
        low, high: ends of the interval at :data:`LEVEL`; NaN for fewer than three examples, where it is no more
            than their range, and where some of the examples alone give no number.
    """

    n: int
    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """The mean of values and its bootstrap interval, bias-corrected and accelerated, by ``scipy.stats.bootstrap``.

    Args:
        values: one for each example.
        seed: of the resamples; the same for every call, so that the intervals of methods on the same examples are of
            the same resamples.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        raise ValueError("there are no examples to average over")
    return of_examples(np.mean, data, 1, seed)


def of_examples(statistic: Callable[..., Any], data: np.ndarray[Any, Any], held: int, seed: int) -> Estimate:
    """A number of examples and its bootstrap interval, as :func:`estimate` has it of a mean.

    Args:
        statistic: from ``data``, resampled along its last axis, and ``axis=`` to the number.
        data: one entry for each example, which may be its place.
        held: numbers that the statistic holds for each entry of a resample.
        seed: of the resamples.
    """
    whole = float(statistic(data, axis=-1))
    if len(data) < LEAST:
        return Estimate(len(data), whole, math.nan, math.nan)
    without_one = statistic(np.stack([np.delete(data, place) for place in range(len(data))]), axis=-1)
    if not np.isfinite(without_one).all():
        return Estimate(len(data), whole, math.nan, math.nan)
    if np.ptp(without_one) <= ROUNDING * abs(whole):
        return Estimate(
            len(data), whole, whole, whole
        )  # every resample is the same, and scipy has no interval for that
    found = (
        need("scipy.stats")
        .bootstrap(
            (data,),
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, min(RESAMPLES, HELD // (held * len(data)))),
            confidence_level=LEVEL,
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return Estimate(len(data), whole, float(found.low), float(found.high))


def difference(ours: Sequence[float], theirs: Sequence[float], seed: int) -> Estimate:
    """The mean of ``ours - theirs``, pair by pair: examples are resampled with both of their values.

    Raises:
        ValueError: not the same examples.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"a paired difference needs the same examples, got {len(ours)} and {len(theirs)}")
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)], seed)
