"""Which tokens are replaced, and what the model says then."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gim.parts import anatomy
from gim.parts.adapters import hugging_face, torch_modules

Protocol = Literal["aopc", "paper"]
GridName = Literal["full", "coarse"]
PROTOCOLS: tuple[Protocol, ...] = ("aopc", "paper")
GRIDS: tuple[GridName, ...] = ("full", "coarse")

#: Comprehensiveness replaces the first 1, 2, ... of the ranking, up to this many.
MOST_REPLACED = 50
#: Sufficiency replaces these shares of the ranking, from its end.
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
#: The coarse grid has these in their place.
COARSE_COUNTS = (1, 2, 4, 8)
COARSE_SHARES = (0.5, 0.8, 0.9)
#: Tokens of one forward where nothing else is asked for: on a CPU, and on a GPU.
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_GPU = 32768
#: Numbers of the vocabulary whose logarithms are summed at once, in float64.
LOGIT_TILE = 2**22


@dataclass(frozen=True)
class Grid:
    """How many tokens are replaced.

    Args:
        counts: of the ranking's first, for comprehensiveness.
        shares: of the ranking's last, for sufficiency.
    """

    counts: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, name: GridName, tokens: int) -> Grid:
        """The grid for a prompt with ``tokens`` tokens that may be replaced.

        A prompt with fewer tokens than a count does without that count.
        """
        counts: Sequence[int] = range(1, MOST_REPLACED + 1) if name == "full" else COARSE_COUNTS
        return cls(tuple(count for count in counts if count <= tokens), SHARES if name == "full" else COARSE_SHARES)


def ranking(scores: torch.Tensor) -> list[int]:
    """Positions of the tokens that may be replaced, highest score first; of equal scores the earlier token first.

    Args:
        scores: ``[T]``. The order is that of the signed scores. The first and the last token are never replaced.
    """
    order = torch.argsort(scores[1:-1], descending=True, stable=True)
    return [int(one) + 1 for one in order]


def first(ranked: Sequence[int], count: int) -> list[int]:
    """The ``count`` tokens that a method calls most important."""
    return list(ranked[:count])


def last(ranked: Sequence[int], share: float) -> list[int]:
    """The share of the tokens that a method calls least important, rounded down to whole tokens."""
    return list(ranked[len(ranked) - int(share * len(ranked)) :])


def replaced(ids: torch.Tensor, positions: Sequence[int], baseline_id: int) -> torch.Tensor:
    """The prompt ``[T]`` with the baseline token at the positions."""
    changed = ids.clone()
    changed[list(positions)] = baseline_id
    return changed


@dataclass(frozen=True)
class Outcome:
    """What the model says at the last position of one input, natural logarithms, in float64.

    Args:
        logit: of the target.
        foil: the logit of the foil.
        log_total: logarithm of the summed exponentials of all logits.
        log_rest: the same without the target.
    """

    logit: float
    foil: float
    log_total: float
    log_rest: float

    def to_list(self) -> list[float]:
        """The four numbers, for JSON."""
        return [self.logit, self.foil, self.log_total, self.log_rest]


def device_of(model: nn.Module) -> torch.device:
    """Where ids must be: with the embedding, or with a model's first weight where it does not say what embeds."""
    try:
        return anatomy.of(model).device
    except TypeError:
        return next((weight.device for weight in model.parameters()), torch.device("cpu"))


class Forwards:
    """A model's logits at the last position of rows of one length; no gradient.

    Args:
        model: a causal language model, or any module from ids ``[B, T]`` to logits ``[B, T, V]``.
        dtype: a type to run it in; None for the model's own. The weights of another type are a copy.
        batch_tokens: tokens of one forward, at most, but for a single longer row; None for a number that suits the
            device.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None, batch_tokens: int | None = None) -> None:
        if dtype is not None and dtype != anatomy.of(model).dtype:
            model = copy.deepcopy(model).to(dtype)
        self.model = model
        self.device = device_of(model)
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS_GPU)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` after rows ``[B, T]``, which follow autograd's mode."""
        parts = anatomy.of(self.model)
        positional, named = parts.call.arguments(parts.call.taken, self.model, ids, None, None)
        if any(core is self.model for core in parts.cores):
            named |= hugging_face.settings(self.model)
            if "logits_to_keep" in torch_modules.parameters(self.model):
                named["logits_to_keep"] = 1
        output: Any = self.model(*positional, **named)
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        found = found[0] if isinstance(found, tuple) else found
        if not isinstance(found, torch.Tensor) or found.dim() != 3:
            raise ValueError(
                f"model must put out logits [B, T, V], by themselves or under the name logits; "
                f"{type(self.model).__name__} put out {type(output).__name__}"
            )
        return found[:, -1]

    @torch.no_grad()
    def outcomes(self, ids: torch.Tensor, target: int, foil: int) -> list[Outcome]:
        """What the model says after each of the rows ``[B, T]``, in batches of :attr:`batch_tokens`."""
        found: list[Outcome] = []
        for batch in ids.split(max(1, self.batch_tokens // ids.shape[1])):
            logits = self.logits(batch)
            for part in logits.split(max(1, LOGIT_TILE // logits.shape[1])):
                found += outcomes_of(part, target, foil)
        return found


def outcomes_of(logits: torch.Tensor, target: int, foil: int) -> list[Outcome]:
    """Of logits ``[B, V]``."""
    wide = logits.to(torch.float64, copy=True)
    if not bool(torch.isfinite(wide).all()):
        raise FloatingPointError("the logits hold NaN or infinity")
    total = wide.logsumexp(-1)
    chosen, against = wide[:, target].clone(), wide[:, foil].clone()
    wide[:, target] = -torch.inf
    columns = torch.stack([chosen, against, total, wide.logsumexp(-1)], dim=1)
    return [Outcome(*row) for row in columns.tolist()]


class Masked:
    """What a model says where tokens of one prompt are replaced, each input run once, whoever asks for it.

    Args:
        forwards: runs the model.
        ids: the prompt ``[T]``.
        target, foil: ids whose logits count.
        baseline_id: what a token is replaced by.
        whole: what the model says after the prompt itself.
    """

    def __init__(
        self, forwards: Forwards, ids: torch.Tensor, target: int, foil: int, baseline_id: int, whole: Outcome
    ) -> None:
        self.ids = ids
        self.baseline_id = baseline_id
        self.target = target
        self._forwards = forwards
        self._foil = foil
        self._known: dict[tuple[int, ...], Outcome] = {tuple(ids.tolist()): whole}

    @property
    def rows_at_once(self) -> int:
        """Rows of one forward."""
        return max(1, self._forwards.batch_tokens // len(self.ids))

    def of_rows(self, rows: torch.Tensor) -> list[Outcome]:
        """What the model says after whole rows ``[B, T]``; those that are known are not run again."""
        keys = [tuple(row) for row in rows.tolist()]
        unknown = {key: index for index, key in enumerate(keys) if key not in self._known}
        if unknown:
            fresh = self._forwards.outcomes(rows[list(unknown.values())], self.target, self._foil)
            self._known.update(zip(unknown, fresh, strict=True))
        return [self._known[key] for key in keys]

    def of_sets(self, sets: Sequence[Sequence[int]]) -> list[Outcome]:
        """What the model says where each set of positions is replaced."""
        if not sets:
            return []
        return self.of_rows(torch.stack([replaced(self.ids, one, self.baseline_id) for one in sets]))
