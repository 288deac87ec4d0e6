"""Where inside a model an explained number comes from: scores of its layers for each token, or of its heads."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gim import saved
from gim.attribution import Attribution, data_frame
from gim.files import write_atomically, written
from gim.targets import PERS, Per, counted

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType


@dataclass(frozen=True)
class RankedCell:
    """One of the strongest scores.

    Args:
        rank: from 1.
        layer: index of the layer.
        column: index of the token or the head.
        score: its score.
    """

    rank: int
    layer: int
    column: int
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class LayerwiseAttribution:
    """Scores of a model's inside from the backward that gave the tokens theirs: a value times its gradient.

    With ``per="layer"`` the value is the residual stream that each layer reads, token by token: the hidden states that
    transformers lists, but for the last. A column shows down to which depth what is explained depends on that token's
    place, and where it has moved on to others. With ``per="head"`` the value is the output of each query head of each
    layer, its tokens summed.

    Scores are relative to 0, not to the baseline, which is a token and has no layers.

    Args:
        attribution: the tokens' own scores, and all that is known of the run.
        per: ``"layer"`` or ``"head"``.
        scores: ``[L, T]`` or ``[L, H]``, float32, on the CPU, finite.
        layers: the names of the L layers, as in ``model.named_modules()``.

    Raises:
        ValueError: a ``per`` that does not exist, shapes that do not fit, scores that are not finite float32 numbers
            on the CPU.
    """

    attribution: Attribution
    per: Per
    scores: torch.Tensor
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.per not in PERS:
            raise ValueError(f"per must be one of {PERS}, got {self.per!r}")
        given, rows = self.scores, len(self.layers)
        columns = len(self.attribution) if self.per == "layer" else given.shape[-1] if given.dim() else 0
        if tuple(given.shape) != (rows, columns) or given.dtype != torch.float32 or given.device.type != "cpu":
            raise ValueError(
                f"scores must be float32 of shape {[rows, columns]} on the CPU, got {given.dtype} of "
                f"{list(given.shape)} on {given.device}"
            )
        if not bool(torch.isfinite(given).all()):
            raise ValueError("scores must be finite")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerwiseAttribution):
            return NotImplemented
        return torch.equal(self.scores, other.scores) and all(
            getattr(self, one.name) == getattr(other, one.name)
            for one in dataclasses.fields(self)
            if one.name != "scores"
        )

    # Tensors have no hash of their values.
    __hash__ = None  # type: ignore[assignment]

    @property
    def aside(self) -> tuple[bool, ...]:
        """Whether each column is set aside: with ``per="layer"`` that of a special token or of a chat template's."""
        return self.attribution.aside if self.per == "layer" else (False,) * self.scores.shape[1]

    def top(self, k: int = 10) -> list[RankedCell]:
        """The scores that are largest in absolute value, tokens that are set aside left out.

        Args:
            k: how many, at least 1.

        Raises:
            ValueError: `k` below 1.
        """
        k = counted("k", k)
        shown = self.scores.abs().masked_fill(torch.tensor(self.aside, dtype=torch.bool, device="cpu"), -1.0)
        order = torch.argsort(shown.flatten(), descending=True, stable=True)[:k].tolist()
        width = self.scores.shape[1]
        places = [divmod(place, width) for place in order]
        return [
            RankedCell(rank, layer, column, float(self.scores[layer, column]))
            for rank, (layer, column) in enumerate(places, start=1)
            if float(shown[layer, column]) >= 0
        ]

    # -- other forms

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as :meth:`to_json` writes it."""
        return saved.layerwise_to_fields(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each score, layer by layer.

        Returns:
            Columns ``layer``, the index; then ``position``, ``token`` and ``score``, or ``head`` and ``score``.

        Raises:
            ImportError: pandas, which the extra ``evaluate`` installs, is missing.
        """
        rows, columns = self.scores.shape
        across = [column for _ in range(rows) for column in range(columns)]
        tokens = self.attribution.tokens
        return data_frame(
            {
                "layer": [row for row in range(rows) for _ in range(columns)],
                **(
                    {"position": across, "token": [tokens[column] for column in across]}
                    if self.per == "layer"
                    else {"head": across}
                ),
                "score": self.scores.flatten().numpy(),
            }
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The result as JSON, from which :meth:`from_json` makes an equal one; scores to the last bit.

        Args:
            path: a file to write it to as well, in one step.

        Raises:
            OSError: the file cannot be written.
        """
        return written(saved.to_document(self.to_dict()), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str], *, max_bytes: int = saved.MAX_BYTES) -> LayerwiseAttribution:
        """The inverse of :meth:`to_json`; arguments and errors as of :meth:`gim.Attribution.from_json`."""
        fields = saved.read_layerwise(source, max_bytes)
        return cls(attribution=Attribution(**fields.pop("attribution")), **fields)

    # -- to look

    def to_html(self, path: str | os.PathLike[str] | None = None, *, top: int = 20) -> str:
        """One self-contained page that loads nothing: the prompt as :meth:`gim.Attribution.to_html` has it, and a map
        of the layers.

        Args:
            path: a file to write it to as well, in one step.
            top: rows of the table of the strongest tokens.

        Raises:
            OSError: the file cannot be written.
        """
        from gim.report import layerwise

        return written(layerwise.page(self, top=top), path)

    def to_png(self, path: str | os.PathLike[str], *, top: int = 40) -> None:
        """Draw the map as a picture.

        Args:
            path: the PNG file to write, in one step.
            top: with ``per="layer"`` the tokens that have a row, at least 40: those with the strongest scores.

        Raises:
            ImportError: matplotlib, which the extra ``report`` installs, is missing.
            OSError: the file cannot be written.
        """
        from gim.report import layerwise

        write_atomically(path, layerwise.png(self, top=top))

    def _repr_html_(self) -> str:
        from gim.report import layerwise

        return layerwise.cell(self)

    def __rich__(self) -> RenderableType:
        from gim.report import layerwise

        return layerwise.view(self)

    def __repr__(self) -> str:
        strongest = ", ".join(f"{self.name(cell)} {cell.score:+.3g}" for cell in self.top(3))
        return (
            f"LayerwiseAttribution(per={self.per!r}, {' x '.join(map(str, self.scores.shape))}, "
            f"model={self.attribution.model!r}, target={self.attribution.target.label!r}, "
            f"strongest: {strongest or 'none'})"
        )

    def name(self, cell: RankedCell) -> str:
        """A score's place in words: ``layer 3, ' lantern'`` or ``layer 3, head 5``."""
        column = repr(self.attribution.tokens[cell.column]) if self.per == "layer" else f"head {cell.column}"
        return f"layer {cell.layer}, {column}"
