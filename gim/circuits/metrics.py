"""What a model is asked for on a pair: one number of its logits after the prompt, higher where it answers rightly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Ids of right and of wrong next tokens.
Answers = tuple[Sequence[int], Sequence[int]]
#: From logits ``[B, V]`` and each row's answers to numbers ``[B]``, through which a gradient flows.
Metric = Callable[[torch.Tensor, Sequence[Answers]], torch.Tensor]


def logit_difference(logits: torch.Tensor, answers: Sequence[Answers]) -> torch.Tensor:
    """The mean logit of the right tokens minus that of the wrong ones."""
    return torch.stack(
        [row[list(right)].mean() - row[list(wrong)].mean() for row, (right, wrong) in _rows(logits, answers)]
    )


def probability_difference(logits: torch.Tensor, answers: Sequence[Answers]) -> torch.Tensor:
    """The probability of the right tokens minus that of the wrong ones."""
    rows = _rows(logits.softmax(-1), answers)
    return torch.stack([row[list(right)].sum() - row[list(wrong)].sum() for row, (right, wrong) in rows])


def _rows(numbers: torch.Tensor, answers: Sequence[Answers]) -> list[tuple[torch.Tensor, Answers]]:
    return list(zip(numbers, answers, strict=True))


#: By name, for the command line and for files.
METRICS: dict[str, Metric] = {
    "logit_difference": logit_difference,
    "probability_difference": probability_difference,
}


def name_of(metric: Metric) -> str:
    """What a file calls a metric."""
    return next(
        (name for name, one in METRICS.items() if one is metric),
        getattr(metric, "__qualname__", type(metric).__qualname__),
    )
