"""What an evaluation found: tidy, averaged with intervals, compared, drawn."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gim.evaluation import measures
from gim.evaluation.extras import need
from gim.evaluation.measures import HIGHER_IS_BETTER, METRICS, MeasureName, Record
from gim.evaluation.perturbation import Outcome
from gim.evaluation.statistics import Estimate, difference, estimate
from gim.files import check_writable, write_atomically, written

if TYPE_CHECKING:
    import pandas as pd

#: Under which name a saved evaluation has its examples, and the most bytes of them that are read.
WHOLE = b"gim.evaluation"
MAX_BYTES = 2**30


class Evaluation:
    """Values of every metric under every measure, for each method on each example.

    Args:
        records: finished examples, as :mod:`gim.evaluation.run` makes them.
        measures: names of the explained numbers.
        settings: what was evaluated: model, methods, protocol, grid, baseline, seed, versions; ``seen`` examples, and
            ``dropped`` of them, which the model had wrong.
    """

    def __init__(self, records: Sequence[Record], measures: Sequence[MeasureName], settings: Mapping[str, Any]) -> None:
        self.records = list(records)
        self.measures = list(measures)
        self.settings = dict(settings)

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order in which they were given."""
        return [name for name, _ in self.settings["methods"]]

    @property
    def dropped(self) -> int:
        """Examples that were looked at and dropped, because the model had them wrong."""
        return int(self.settings["dropped"])

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self)} examples ({self.dropped} dropped as wrong), {len(self.methods)} methods, "
            f"measures {', '.join(self.measures)}, protocol {self.settings['protocol']}, grid {self.settings['grid']})"
        )

    # -- numbers

    def to_dataframe(self) -> pd.DataFrame:
        """One value a row.

        Returns:
            Columns ``example`` (from 0, in the order of the data), ``method``, ``measure``, ``metric``
            (``comprehensiveness``, ``sufficiency``, and on the full grid ``loo_correlation``) and ``value``.
        """
        rows = [
            (record["example"], method, measure, metric, value)
            for record in self.records
            for method in self.methods
            for measure in self.measures
            for metric, value in measures.of_method(record, method, measure, self.settings["protocol"]).items()
        ]
        return need("pandas").DataFrame(rows, columns=["example", "method", "measure", "metric", "value"])

    def examples(self) -> pd.DataFrame:
        """Columns ``example``, ``id``, ``tokens``, ids of ``target`` and ``foil``, and f(x) under each measure."""
        rows = []
        for record in self.records:
            whole = Outcome(*record["whole"])
            said = {measure: measures.MEASURES[measure](whole) for measure in self.measures}
            rows.append({name: record[name] for name in ("example", "id", "tokens", "target", "foil")} | said)
        return need("pandas").DataFrame(rows)

    def table(self, reference: str | None = None) -> pd.DataFrame:
        """Means over examples with 95 % bootstrap intervals, best first within measure and metric.

        Args:
            reference: a method that every other is compared with, example by example.

        Returns:
            Columns ``measure``, ``metric``, ``method``, ``n``, ``mean``, ``low``, ``high``; with a reference also
            ``difference`` (method minus reference), ``difference_low`` and ``difference_high``.

        Raises:
            ValueError: a reference that is no method.
        """
        values = self._values()
        if reference is not None:
            self._check_method(reference, "reference")
        rows = []
        for measure in self.measures:
            for metric in self._metrics():
                found = {name: estimate(values[name, measure, metric], self._seed) for name in self.methods}
                better = -1 if HIGHER_IS_BETTER[metric] else 1
                for name in sorted(self.methods, key=lambda one: better * found[one].mean):
                    row = {"measure": measure, "metric": metric, "method": name, **_columns(found[name])}
                    if reference is not None:
                        gap = difference(values[name, measure, metric], values[reference, measure, metric], self._seed)
                        row |= {"difference": gap.mean, "difference_low": gap.low, "difference_high": gap.high}
                    rows.append(row)
        return need("pandas").DataFrame(rows)

    def compare(self, a: str, b: str) -> pd.DataFrame:
        """Method a minus method b, example by example.

        Returns:
            Columns ``measure``, ``metric``, ``n``, ``mean`` (of a - b), ``low``, ``high`` and ``better``: the method
            that the whole interval speaks for, empty where it holds 0 or cannot be told.

        Raises:
            ValueError: a name that is no method.
        """
        for argument, name in (("a", a), ("b", b)):
            self._check_method(name, argument)
        values = self._values()
        rows = []
        for measure in self.measures:
            for metric in self._metrics():
                gap = difference(values[a, measure, metric], values[b, measure, metric], self._seed)
                winner = ""
                if gap.low > 0 or gap.high < 0:
                    winner = a if (gap.mean > 0) == HIGHER_IS_BETTER[metric] else b
                rows.append({"measure": measure, "metric": metric, **_columns(gap), "better": winner})
        return need("pandas").DataFrame(rows)

    def curves(self) -> pd.DataFrame:
        """How f falls as tokens are replaced, averaged over the examples that are long enough.

        Returns:
            Columns ``measure``, ``metric``, ``method``, ``replaced`` (a number of tokens for comprehensiveness, a share
            for sufficiency), ``n`` examples and ``drop``: the mean of f(x) - f, over f(x) under ``logit``.
        """
        found: dict[tuple[str, str, str, float], list[float]] = {}
        for record in self.records:
            whole = Outcome(*record["whole"])
            for measure in self.measures:
                for name in self.methods:
                    said = record["methods"][name]
                    for metric, points, masked in (
                        ("comprehensiveness", record["counts"], said["first"]),
                        ("sufficiency", record["shares"], said["last"]),
                    ):
                        dropped = measures.drops(whole, measures.outcomes(masked), measure)
                        for point, value in zip(points, dropped, strict=True):
                            found.setdefault((measure, metric, name, point), []).append(value)
        rows = [(*key, len(several), sum(several) / len(several)) for key, several in found.items()]
        frame = need("pandas").DataFrame(rows, columns=["measure", "metric", "method", "replaced", "n", "drop"])
        return frame.sort_values(["measure", "metric", "method", "replaced"], ignore_index=True)

    def seconds(self) -> pd.DataFrame:
        """What an example took: columns ``step`` (a method, or ``masked inputs``) and ``seconds``, the mean."""
        steps = [*self.methods, "masked inputs"]
        rows = [(step, sum(record["seconds"][step] for record in self.records) / len(self)) for step in steps]
        return need("pandas").DataFrame(rows, columns=["step", "seconds"])

    # -- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dataframe` as Parquet, in one step, with all that :meth:`load` needs in the file's metadata.

        Args:
            path: ``.parquet``.

        Raises:
            ValueError: another ending.
            OSError: the file cannot be written.
            ImportError: pyarrow is missing.
        """
        arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
        if Path(path).suffix != ".parquet":
            raise ValueError(f"path must end in .parquet, got {path}")
        check_writable(path)
        table = arrow.Table.from_pandas(self.to_dataframe(), preserve_index=False)
        whole = {"records": self.records, "measures": self.measures, "settings": self.settings}
        metadata = {
            **(table.schema.metadata or {}),
            b"gim": json.dumps(self.settings).encode(),
            WHOLE: zlib.compress(json.dumps({**whole, "sum": _sum(whole)}).encode()),
        }
        sink = arrow.BufferOutputStream()
        parquet.write_table(table.replace_schema_metadata(metadata), sink)
        write_atomically(path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """What :meth:`save` wrote, to be tabulated and drawn again.

        Raises:
            ValueError: a file that is none, one of an earlier version, which kept the values alone, or one whose
                values are not those of its examples.
            OSError: the file cannot be read.
            ImportError: pyarrow is missing.
        """
        arrow, parquet = need("pyarrow"), need("pyarrow.parquet")
        try:
            with Path(path).open("rb") as file:
                table = parquet.read_table(file)
            packed = (table.schema.metadata or {})[WHOLE]
            unpacking = zlib.decompressobj()
            whole = dict(json.loads(unpacking.decompress(packed, MAX_BYTES)))
            if whole.pop("sum") != _sum(whole):
                raise ValueError("it is not as it was written")
            found = cls(**whole)
            same = arrow.Table.from_pandas(found.to_dataframe(), preserve_index=False).equals(table)
        except KeyError as error:
            raise ValueError(f"{path} is no evaluation that can be loaded: it has no {error}") from error
        except (arrow.ArrowException, zlib.error, ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"{path} is no evaluation that can be loaded: {error}") from error
        if not same:
            raise ValueError(f"{path} is no evaluation that can be loaded: its values are not those of its examples")
        return found

    def to_html(self, path: str | os.PathLike[str] | None = None, *, reference: str | None = None) -> str:
        """The tables and the curves as one self-contained page that loads nothing.

        Args:
            path: a file to write it to as well, in one step.
            reference: as in :meth:`table`; None for the first method.

        Returns:
            The page.

        Raises:
            OSError: the file cannot be written.
            ImportError: matplotlib is missing.
        """
        from gim.evaluation import page

        return written(page.html(self, reference or self.methods[0]), path)

    # -- inside

    @property
    def _seed(self) -> int:
        return int(self.settings["seed"])

    def _metrics(self) -> list[measures.Metric]:
        has_single = all(record["single"] is not None for record in self.records)
        return [metric for metric in METRICS if metric != "loo_correlation" or has_single]

    def _values(self) -> dict[tuple[str, str, str], list[float]]:
        """By method, measure and metric: a value for each example."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for row in self.to_dataframe().itertuples(index=False):
            found.setdefault((row.method, row.measure, row.metric), []).append(float(row.value))
        return found

    def _check_method(self, name: str, argument: str) -> None:
        if name not in self.methods:
            raise ValueError(f"{argument} must be one of {', '.join(self.methods)}, got {name!r}")


def _sum(whole: Mapping[str, Any]) -> str:
    """By which what is read is known to be what was written."""
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


def _columns(one: Estimate) -> dict[str, Any]:
    return {"n": one.n, "mean": one.mean, "low": one.low, "high": one.high}
