"""How faithful circuits of every size are: MIB's curve, and the areas under it and beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gim.evaluation.extras import need
from gim.evaluation.statistics import Estimate, of_examples

if TYPE_CHECKING:
    import pandas as pd

#: Shares of all edges at which MIB looks.
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: By whether a score's sign counts.
ORDERS = ("signed", "absolute")


@dataclass(frozen=True)
class Point:
    """A circuit of one size.

    Args:
        order: ``"signed"``, or ``"absolute"`` where a score's sign did not count.
        size: share of all edges, or nodes, that were chosen.
        chosen: as a number.
        edges: that are left after pruning.
        faithfulness: the share of the metric that it keeps, with its interval over pairs.
    """

    order: str
    size: float
    chosen: int
    edges: int
    faithfulness: Estimate


class Curve:
    """Faithfulness over the size of a circuit: (m(circuit) - m(corrupted)) / (m(clean) - m(corrupted)).

    Metrics are averaged over the pairs first, as in MIB; intervals are of bootstraps over pairs, whole pairs with all
    of their sizes.

    Args:
        clean, corrupted: the metric ``[pairs]`` of the model itself after the clean prompts, and after the corrupted.
        values: for each order, the metric ``[pairs, sizes]`` of each circuit.
        sizes: shares of all edges, ascending.
        chosen: how many edges, or nodes, each of them is.
        edges: for each order, how many edges are left of each.
        seed: of the bootstrap.

    Raises:
        ValueError: the metric is the same on clean and corrupted prompts.
    """

    def __init__(
        self,
        clean: Sequence[float],
        corrupted: Sequence[float],
        values: dict[str, Sequence[Sequence[float]]],
        sizes: Sequence[float],
        chosen: Sequence[int],
        edges: dict[str, Sequence[int]],
        seed: int = 0,
    ) -> None:
        self.sizes = tuple(sizes)
        self._clean, self._corrupted = (np.asarray(one, dtype=np.float64) for one in (clean, corrupted))
        if self._clean.mean() == self._corrupted.mean():
            raise ValueError("the metric is the same on clean and corrupted prompts, so no circuit can keep it")
        self._values = {order: np.asarray(one, dtype=np.float64) for order, one in values.items()}
        self._chosen, self._edges, self._seed = chosen, edges, seed

    def __repr__(self) -> str:
        return f"Curve({len(self._clean)} pairs, CPR {self.cpr.mean:.3f}, CMD {self.cmd.mean:.3f})"

    @property
    def clean(self) -> float:
        """The metric of the model itself after the clean prompts, on average."""
        return float(self._clean.mean())

    @property
    def corrupted(self) -> float:
        """The same after the corrupted prompts."""
        return float(self._corrupted.mean())

    @property
    def points(self) -> list[Point]:
        """Every size of both orders."""
        return [
            Point(
                order, size, self._chosen[index], self._edges[order][index],
                self._estimate(order, lambda shares, index=index: shares[..., index]),
            )
            for order in ORDERS
            for index, size in enumerate(self.sizes)
        ]  # fmt: skip

    @property
    def cpr(self) -> Estimate:
        """Area under the curve of the signed order, by the trapezoidal rule over sizes: higher is better."""
        return self._estimate("signed", self._area)

    @property
    def cmd(self) -> Estimate:
        """Area between the curve of the absolute order and 1: lower is better."""
        return self._estimate("absolute", lambda shares: self._area(np.abs(1 - shares)))

    def to_dataframe(self) -> pd.DataFrame:
        """Columns ``order``, ``size``, ``chosen``, ``edges``, ``n``, ``faithfulness``, ``low`` and ``high``."""
        rows = [
            (
                point.order, point.size, point.chosen, point.edges, point.faithfulness.n, point.faithfulness.mean,
                point.faithfulness.low, point.faithfulness.high,
            )
            for point in self.points
        ]  # fmt: skip
        columns = ["order", "size", "chosen", "edges", "n", "faithfulness", "low", "high"]
        return need("pandas", "circuits").DataFrame(rows, columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: every pair's metrics, from which everything else is computed."""
        return {
            "sizes": list(self.sizes),
            "chosen": list(self._chosen),
            "edges": {order: list(one) for order, one in self._edges.items()},
            "clean": self._clean.tolist(),
            "corrupted": self._corrupted.tolist(),
            "values": {order: one.tolist() for order, one in self._values.items()},
        }

    def _area(self, heights: np.ndarray[Any, Any]) -> Any:
        widths = np.diff(np.asarray(self.sizes))
        return (widths * (heights[..., :-1] + heights[..., 1:]) / 2).sum(-1)

    def _estimate(self, order: str, of_shares: Any) -> Estimate:
        """A number of the curve ``[.., sizes]`` and its interval."""
        values = self._values[order]

        def statistic(places: np.ndarray[Any, Any], axis: int) -> Any:
            clean, corrupted = (one[places].mean(axis)[..., None] for one in (self._clean, self._corrupted))
            means = values[places].mean(axis - 1)
            # Some pairs alone may have the same metric on both prompts, of which nothing is a share.
            with np.errstate(divide="ignore", invalid="ignore"):
                return of_shares((means - corrupted) / (clean - corrupted))

        return of_examples(statistic, np.arange(len(values)), values.shape[1], self._seed)
