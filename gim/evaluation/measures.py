"""From what a model says on masked inputs to comprehensiveness, sufficiency and the correlation with leaving one out.

f(x) is the explained number on the whole prompt x, f(x without S) with the tokens S replaced.

- comprehensiveness: the mean over k of ``f(x) - f(x without the k highest)``; higher is better.
- sufficiency: the mean over shares r of ``f(x) - f(x without the int(r n) lowest)``, n tokens that may be replaced;
  lower is better.
- loo_correlation: Pearson's correlation of the scores with ``f(x) - f(x without token i)`` over those n tokens;
  higher is better. 0 where either is the same for all tokens. Not of ranks: those of tokens that hardly matter hang on
  the last bits.

Under the measure ``logit`` the first two are ratios to f(x), as in the GIM paper; under the others, differences.

Source: DeYoung et al. 2020, arXiv 1911.03429; Edin et al. 2025, arXiv 2505.17630.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gim.evaluation.extras import need
from gim.evaluation.perturbation import MOST_REPLACED, Outcome, Protocol

MeasureName = Literal["logprob", "logit", "logodds", "contrast"]
Metric = Literal["comprehensiveness", "sufficiency", "loo_correlation"]

#: The explained number of each measure.
MEASURES: Mapping[MeasureName, Callable[[Outcome], float]] = {
    "logprob": lambda one: one.logit - one.log_total,
    "logit": lambda one: one.logit,
    "logodds": lambda one: one.logit - one.log_rest,
    "contrast": lambda one: one.logit - one.foil,
}
METRICS: tuple[Metric, ...] = ("comprehensiveness", "sufficiency", "loo_correlation")
#: Whether more is better.
HIGHER_IS_BETTER: Mapping[Metric, bool] = {"comprehensiveness": True, "sufficiency": False, "loo_correlation": True}

#: A finished example, as :mod:`gim.evaluation.store` keeps it.
Record = dict[str, Any]


def drops(whole: Outcome, masked: Sequence[Outcome], measure: MeasureName) -> list[float]:
    """``f(x) - f(masked)`` of each input; under ``logit`` over f(x).

    Raises:
        ZeroDivisionError: the logit of the whole prompt is 0, and there is no ratio to it.
    """
    value = MEASURES[measure]
    full = value(whole)
    over = full if measure == "logit" else 1.0
    return [(full - value(one)) / over for one in masked]


def comprehensiveness(dropped: Sequence[float], protocol: Protocol) -> float:
    """The mean over k; under ``paper`` over its vector of 50, which keeps zeros where the prompt has fewer tokens."""
    return math.fsum(dropped) / (MOST_REPLACED if protocol == "paper" else len(dropped))


def sufficiency(dropped: Sequence[float]) -> float:
    """The mean over shares."""
    return math.fsum(dropped) / len(dropped)


def loo_correlation(scores: Sequence[float], dropped: Sequence[float]) -> float:
    """Pearson's correlation of scores with what leaving each token out does; 0 where either is constant."""
    if len(set(scores)) < 2 or len(set(dropped)) < 2:
        return 0.0
    return float(need("scipy.stats").pearsonr(scores, dropped).statistic)


def outcomes(rows: Sequence[Sequence[float]]) -> list[Outcome]:
    """The inverse of :meth:`Outcome.to_list`, row by row."""
    return [Outcome(*row) for row in rows]


def of_method(record: Record, method: str, measure: MeasureName, protocol: Protocol) -> dict[Metric, float]:
    """Every metric of one method on one finished example.

    Raises:
        ZeroDivisionError: as :func:`drops`; names the example.
    """
    whole, found = Outcome(*record["whole"]), record["methods"][method]
    if measure == "logit" and whole.logit == 0:
        raise ZeroDivisionError(
            f"example {record['example']}: the target's logit on the whole prompt is 0, and the measure logit is a "
            "ratio to it: ask for other measures"
        )
    values: dict[Metric, float] = {
        "comprehensiveness": comprehensiveness(drops(whole, outcomes(found["first"]), measure), protocol),
        "sufficiency": sufficiency(drops(whole, outcomes(found["last"]), measure)),
    }
    if record["single"] is not None:
        # A difference under every measure: a ratio to a negative logit would turn the order round.
        value = MEASURES[measure]
        alone = [value(whole) - value(one) for one in outcomes(record["single"])]
        values["loo_correlation"] = loo_correlation(found["scores"][1:-1], alone)
    return values
